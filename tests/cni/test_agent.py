"""The node agent as a process: who may ask, what it tells."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from cni.agent import run
from interceptor.netns import entered
from tests.cni.agents import Agent, agent, descriptors, wait_until
from tests.cni.calling import CONTAINER, Binary
from tests.cni.conftest import STATIC
from tests.cni.test_add import is_captured
from tests.rig.kernel import snapshot
from tests.rig.net import Pod, pods

SYS_TGKILL = {"x86_64": 234, "aarch64": 131}[os.uname().machine]  # asm/unistd_64.h, asm-generic/unistd.h


def shim(running: Agent, runtime: Pod) -> Binary:
    return Binary((str(STATIC),), runtime, running.socket_path)


def fetch(runtime: Pod, url: str) -> tuple[int, str]:
    """Status and body of a GET from within the namespace that plays the host."""
    with entered(runtime.path):
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


def test_the_socket_is_roots_alone(runtime: Pod, tmp_path: Path) -> None:
    with agent(runtime, tmp_path) as running:
        folder = Path(running.socket_path).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(Path(running.socket_path).stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "attachments").stat().st_mode) == 0o700


def test_a_directory_that_others_use_stays_as_it_is(runtime: Pod, tmp_path: Path) -> None:
    # --socket /run/x.sock must not close /run.
    shared = tmp_path / "run"
    shared.mkdir(mode=0o755)
    (shared / "theirs").touch()
    with agent(runtime, tmp_path) as running:
        assert stat.S_IMODE(shared.stat().st_mode) == 0o755
        assert stat.S_IMODE(Path(running.socket_path).stat().st_mode) == 0o600
    shared.chmod(0o777)
    argv = [sys.executable, "-m", "interceptor", "cni", "agent", "--http", "off", "--socket", str(shared / "cni.sock")]
    with entered(runtime.path):
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 1
    assert "give the socket its own directory" in done.stderr
    assert stat.S_IMODE(shared.stat().st_mode) == 0o777


def test_whichever_thread_is_told_to_stop(runtime: Pod, tmp_path: Path) -> None:
    # The kernel may give a signal to any thread, and does when the first is just making another.
    libc = ctypes.CDLL(None, use_errno=True)
    with agent(runtime, tmp_path) as running:
        pid = running.process.pid
        thread = next(int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid)
        assert libc.syscall(SYS_TGKILL, pid, thread, signal.SIGTERM) == 0
        assert running.process.wait(30) == 0


def test_another_users_request_is_not_answered(runtime: Pod) -> None:
    with tempfile.TemporaryDirectory() as folder, agent(runtime, Path(folder)) as running:
        # Root opens the way: what is tested is the look at the credentials behind it.
        for path in (Path(folder), Path(running.socket_path).parent, Path(running.socket_path)):
            path.chmod(0o777)
        with socket.socket(socket.AF_UNIX) as sock:
            os.seteuid(65534)
            try:
                sock.connect(running.socket_path)
            finally:
                os.seteuid(0)
            assert sock.recv(1) == b""
        assert "uid 65534" in running.wait_for("refused")["reason"]


def test_who_only_looks_whether_it_listens_is_no_news(runtime: Pod, tmp_path: Path) -> None:
    """The installer does, twice a minute."""
    with agent(runtime, tmp_path) as running:
        for said in (b"", b"x"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(running.socket_path)
                sock.sendall(said)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
        running.wait_for("refused")
        assert len([line for line in running.log() if line["event"] == "refused"]) == 1


@pytest.mark.parametrize("said", [b"", b"x", b"GET / HTTP/1.1\r\n\r\n", b"ITC1" + b"\xff" * 8], ids=repr)
def test_what_is_no_shim_does_no_harm(runtime: Pod, tmp_path: Path, pod: Pod, said: bytes) -> None:
    with agent(runtime, tmp_path) as running:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(running.socket_path)
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert shim(running, runtime).call("ADD", pod.path).status == 0


def test_the_first_pod_finds_everything_loaded(runtime: Pod, tmp_path: Path, pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with agent(runtime, tmp_path) as running:
        for command in ("ADD", "CHECK", "DEL"):
            assert shim(running, runtime).call(command, pod.path).status == 0
        before, _, after = running.log_path.read_text().partition('"event": "ready"')
    assert "import time:" in before
    assert "import time:" not in after


def test_a_bug_in_the_rehearsal_does_not_keep_the_agent_from_serving(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(_config: object) -> None:
        raise KeyError("nobody has thought of this")

    monkeypatch.setattr(run.capture, "enable", broken)
    run._rehearse()
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "rehearsal"
    assert "nobody has thought of this" in line


def test_what_a_node_cannot_do_is_in_the_log_before_a_pod_comes(runtime: Pod, tmp_path: Path) -> None:
    with agent(runtime, tmp_path) as running:
        assert "rehearsal" not in [line["event"] for line in running.log()]
    argv = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-m", "interceptor", "cni", "agent", "--http", "off"]
    with entered(runtime.path), (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*argv, "--socket", str(tmp_path / "other" / "cni.sock")], stdout=log, stderr=log)
    try:
        lines = wait_until(lambda: [line for line in (tmp_path / "log").read_text().splitlines() if "ready" in line])
        assert lines
        assert "needs CAP_SYS_ADMIN" in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait()


def test_a_socket_that_was_deleted_comes_back(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    with agent(runtime, tmp_path) as running:
        shutil.rmtree(Path(running.socket_path).parent)
        assert shim(running, runtime).call("ADD", pod.path).status == 0
        assert len(os.listdir(Path(running.socket_path).parent / "attachments")) == 1
        assert running.stop() == 0


def test_a_directory_that_became_read_only_keeps_neither_del_nor_repair(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    before = snapshot(pod)
    folder = tmp_path / "run"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        with agent(runtime, tmp_path) as running, pods(1) as (other,):
            binary = shim(running, runtime)
            with pods(1) as (gone,):
                for each in (pod, other, gone):
                    assert binary.call("ADD", each.path, CNI_CONTAINERID=each.name).status == 0
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            done = binary.call("DEL", pod.path, CNI_CONTAINERID=pod.name)
            assert (done.status, done.stderr) == (0, "")
            assert snapshot(pod) == before
            other.run("nft", "delete", "table", "inet", "interceptor")
            wait_until(lambda: is_captured(other), other)
            assert snapshot(pod) == before
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_del_of_a_container_with_a_long_name_takes_its_rules_away(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    before = snapshot(pod)
    with agent(runtime, tmp_path) as running:
        binary = shim(running, runtime)
        for command in ("ADD", "DEL"):
            done = binary.call(command, pod.path, CNI_CONTAINERID="x" * 300)
            assert (done.status, done.stderr) == (0, "")
    assert snapshot(pod) == before


KEPT = {"containerID": CONTAINER, "ifname": "eth0"}


@pytest.mark.parametrize(
    ("given", "stays"),
    [
        ({}, True),
        ({"cni.dev/attachments": None}, True),
        ({"cni.dev/attachments": {}}, True),
        ({"cni.dev/attachments": [KEPT]}, True),
        ({"cni.dev/valid-attachments": [{**KEPT, "more": 1}]}, True),
        ({"cni.dev/valid-attachments": None, "cni.dev/attachments": []}, False),
        ({"cni.dev/attachments": ["x"]}, True),
        ({"cni.dev/attachments": [{"containerID": CONTAINER}]}, True),
        ({"cni.dev/attachments": []}, False),
        ({"cni.dev/attachments": [{**KEPT, "ifname": "eth1"}]}, False),
    ],
    ids=repr,
)
def test_gc_forgets_what_a_list_says_is_gone(
    runtime: Pod, tmp_path: Path, pod: Pod, given: dict[str, object], stays: bool
) -> None:
    with agent(runtime, tmp_path) as running:
        binary = shim(running, runtime)
        assert binary.call("ADD", pod.path).status == 0
        assert binary.call("GC", None, {**binary.config("1.1.0", prevResult=None), **given}).status == 0
        assert bool(os.listdir(Path(running.socket_path).parent / "attachments")) is stays
    assert is_captured(pod)


def test_health_readiness_and_metrics(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    with agent(runtime, tmp_path, "--http", "127.0.0.1:15014") as running:
        binary = shim(running, runtime)
        assert binary.call("ADD", pod.path).status == 0
        assert binary.call("ADD", pod.path, binary.config(prevResult=None)).code == 7
        assert fetch(runtime, "http://127.0.0.1:15014/healthz") == (200, "ok\n")
        assert fetch(runtime, "http://127.0.0.1:15014/readyz") == (200, "ready\n")
        assert fetch(runtime, "http://127.0.0.1:15014/nothing")[0] == 404
        lines = fetch(runtime, "http://127.0.0.1:15014/metrics")[1].splitlines()
        assert 'interceptor_cni_requests_total{command="ADD",result="ok"} 1' in lines
        assert 'interceptor_cni_failures_total{command="ADD",reason="config"} 1' in lines
        assert 'interceptor_cni_request_duration_seconds_count{command="ADD"} 2' in lines
        assert 'interceptor_cni_pods{state="captured"} 1' in lines
        assert binary.call("DEL", pod.path).status == 0
        lines = fetch(runtime, "http://127.0.0.1:15014/metrics")[1].splitlines()
        assert 'interceptor_cni_pods{state="captured"} 0' in lines


def test_a_pod_that_was_let_through_uncaptured_is_not_counted_as_captured(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    with agent(runtime, tmp_path, "--http", "127.0.0.1:15014", "--repair", "off") as running:
        binary = shim(running, runtime)
        impossible = binary.config(capture={"backend": "nft", "proxy_cgroup": "no/such/cgroup"}, onFailure="bypass")
        assert binary.call("ADD", pod.path, impossible).status == 0
        lines = fetch(runtime, "http://127.0.0.1:15014/metrics")[1].splitlines()
        assert 'interceptor_cni_pods{state="captured"} 0' in lines
        assert 'interceptor_cni_pods{state="drifted"} 1' in lines


def test_each_request_is_one_line_of_json(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    with agent(runtime, tmp_path) as running:
        binary = shim(running, runtime)
        binary.call("ADD", pod.path, CNI_ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web")
        binary.call("ADD", pod.path, binary.config(prevResult=None))
        requests = [line for line in running.log() if line["event"] == "request"]
        assert [(line["command"], line["pod"], line.get("decision")) for line in requests] == [
            ("ADD", "shop/web", "capture"),
            ("ADD", None, None),
        ]
        assert requests[1]["code"] == 7
        assert json.dumps(requests)


def test_an_error_names_the_namespace_as_the_runtime_does(runtime: Pod, tmp_path: Path) -> None:
    path = tmp_path / "netns"
    path.touch()
    with agent(runtime, tmp_path) as running:
        done = shim(running, runtime).call("ADD", str(path))
        assert done.code == 8
        assert str(path) in done.object["details"] + done.object["msg"]
        assert "/proc/self/fd" not in done.stdout.decode()


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--socket", "relative"), "--socket"), (("--http", "15014"), "--http"), (("--http", "localhost:1"), "--http")],
)
def test_a_bad_option_is_named(options: tuple[str, ...], named: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "interceptor", "cni", "agent", *options], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 2
    assert named in done.stderr


def test_what_is_there_already_and_no_socket_is_left_alone(runtime: Pod, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    argv = [sys.executable, "-m", "interceptor", "cni", "agent", "--http", "off", "--socket", str(path)]
    with entered(runtime.path):
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 1
    assert "no socket" in done.stderr
    assert path.read_text() == "mine"


def test_a_request_that_is_being_carried_out_is_answered_after_sigterm(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    with agent(runtime, tmp_path) as running, ThreadPoolExecutor(1) as pool:
        binary = shim(running, runtime)
        waiting = pool.submit(binary.call, "ADD", pod.path, timeout_s=60)
        wait_until(lambda: waiting.done() or descriptors(running.process.pid) > 12)
        running.process.send_signal(signal.SIGTERM)
        with agent(runtime, tmp_path, "--http", "off", name="second"):
            assert waiting.result().status == 0
    assert is_captured(pod)
