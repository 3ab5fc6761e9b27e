"""`interceptor demo`: run for real, ended in every way, nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.machine import INTERCEPTOR, UNPRIVILEGED, kernel_state, sh, wait_for

Start = Callable[..., subprocess.Popen[str]]

pytestmark = [pytest.mark.netns, pytest.mark.slow]

EXPECTED = [
    ("client", "outbound", "192.0.2.2:8080"),
    ("client", "outbound", "[2001:db8::2]:8080"),
    ("server", "inbound", "192.0.2.2:8080"),
    ("server", "inbound", "[2001:db8::2]:8080"),
]


def demo(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*INTERCEPTOR, "demo", *args], text=True, capture_output=True, timeout=30, check=False)


def left_of(pid: int) -> list[str]:
    """The namespaces and processes of the demo with this pid."""
    name = f"itc-demo-{pid}-"
    return [*(path.name for path in Path("/run/netns").glob(f"{name}*")), *_inhabitants(pid)]


def _inhabitants(pid: int) -> list[str]:
    # The demo's children lead no life of their own name: their parent tells.
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(pid):
            found.append(path.parent.name)
    return found


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts demos, and ends them with the test."""
    running: list[subprocess.Popen[str]] = []

    def start_demo(*args: str) -> subprocess.Popen[str]:
        argv = [*INTERCEPTOR, "demo", *args]
        running.append(subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return running[-1]

    yield start_demo
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


@pytest.mark.default_relay
def test_every_flow_of_both_pods_is_shown_with_its_rule() -> None:
    done = demo("--json", "--requests", "1")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    captured = [flow for flow in document["flows"] if flow["fate"] == "captured"]
    assert sorted((flow["pod"], flow["direction"], flow["original_dst"]) for flow in captured) == EXPECTED
    assert {flow["option"] for flow in captured} == {"--outbound redirect", "--inbound redirect"}
    assert {(flow["pod"], flow["uid"]) for flow in captured} == {("client", 1000), ("server", 1001)}
    assert all(flow["pid"] and flow["command"] and flow["bytes_sent"] > 50 and flow["bytes_received"] > 50 for flow in captured)
    assert (document["ok"], document["expected"], document["missing"], document["unexpected"]) == (True, 4, [], [])


def test_the_excluded_port_is_direct() -> None:
    (flow,) = (flow for flow in json.loads(demo("--json").stdout)["flows"] if flow["fate"] != "captured")
    assert (flow["fate"], flow["original_dst"], flow["option"]) == ("direct", "192.0.2.2:9090", "--exclude-outbound-ports")


@pytest.mark.default_relay
def test_the_table_is_for_people() -> None:
    done = demo("--requests", "3")
    lines = done.stdout.splitlines()
    heading = next(line for line in lines if line.startswith("TIME"))
    assert heading.split() == ["TIME", "POD", "WHO", "UID", "DESTINATION", "RULE", "SENT", "RECV", "TOOK", "END"]
    rows = lines[lines.index(heading) + 1 : -2]
    assert len(rows) == 3 * 4 + 1
    assert max(map(len, rows)) <= 120
    assert lines[-1].startswith("OK: 12 of 12 expected flows were captured")
    assert all(re.search(r"(curl|httpd)\[\d+\] +100[01] ", row) for row in rows)


@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy"])
def test_every_backend_shows_the_same(backend: str) -> None:
    done = demo("--json", "--requests", "1", "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert {pod["backend"] for pod in json.loads(done.stdout)["pods"]} == {backend}


@pytest.mark.default_relay
def test_nothing_is_left_after_a_good_end(start: Start) -> None:
    before = kernel_state(None)
    process = start()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert left_of(process.pid) == []
    assert kernel_state(None) == before


# Each is a point in the demo's life: names appear, the proxies start, requests run.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("point", ["first namespace", "second namespace", "a child", "three children"])
def test_nothing_is_left_after_a_signal(start: Start, number: signal.Signals, point: str) -> None:
    process = start("--requests", "200")
    names = Path("/run/netns")
    conditions = {
        "first namespace": lambda: any(names.glob(f"itc-demo-{process.pid}-*")),
        "second namespace": lambda: (names / f"itc-demo-{process.pid}-server").exists(),
        "a child": lambda: bool(_inhabitants(process.pid)),
        "three children": lambda: len(_inhabitants(process.pid)) >= 3,
    }
    wait_for(conditions[point], point)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "", "")
    assert left_of(process.pid) == []


def test_keep_stays_until_ctrl_c_and_shows_what_one_does(start: Start) -> None:
    process = start("--keep", "--requests", "1")
    assert process.stdout is not None
    assert process.stderr is not None
    hints = [process.stderr.readline()]
    while hints[-1] != "Flows:\n":
        hints.append(process.stderr.readline())
    # The commands it prints are for the user: the ones that change nothing must work as they stand.
    for hint in (line.split() for line in hints if line.startswith("  ")):
        if hint[0] == "interceptor":
            assert sh(*INTERCEPTOR, *hint[1:])
        if hint[:3] == ["ip", "netns", "exec"]:
            assert sh(*hint)
    shown = ""
    while "OK: " not in shown:
        shown += process.stdout.readline()
    row = process.stdout.readline()
    assert "--outbound redirect" in row or "--inbound redirect" in row
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert left_of(process.pid) == []


def test_keep_with_json_prints_a_document_and_then_a_line_for_each_flow(start: Start) -> None:
    process = start("--keep", "--json", "--requests", "1")
    assert process.stdout is not None
    document = process.stdout.readline()
    while not document.endswith("\n}\n"):
        document += process.stdout.readline()
    assert json.loads(document)["ok"]
    client = f"itc-demo-{process.pid}-client"
    sh("ip", "netns", "exec", client, "setpriv", "--reuid", "1000", "--clear-groups", "curl", "-s", "http://192.0.2.2:8080/")
    flow = json.loads(process.stdout.readline())
    assert (flow["original_dst"], flow["fate"]) == ("192.0.2.2:8080", "captured")


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A network namespace for the demo to work from."""
    name = f"itc-e2e-{os.getpid()}-d"
    sh("ip", "netns", "add", name)
    yield name
    sh("ip", "netns", "del", name)


@pytest.mark.parametrize("by", ["name", "path", "pid"])
def test_it_works_from_another_namespace_and_never_in_ours(start: Start, elsewhere: str, by: str) -> None:
    path = f"/run/netns/{elsewhere}"
    sleeper = subprocess.Popen(["ip", "netns", "exec", elsewhere, "sleep", "60"])
    wanted = os.stat(path).st_ino
    wait_for(lambda: Path(f"/proc/{sleeper.pid}/comm").read_text() == "sleep\n", "a process in the namespace")
    before = kernel_state(None), kernel_state(elsewhere)
    try:
        process = start("--keep", "--json", "--netns", {"name": elsewhere, "path": path, "pid": str(sleeper.pid)}[by])
        assert process.stdout is not None
        document = process.stdout.readline()
        while not document.endswith("\n}\n"):
            document += process.stdout.readline()
        # All is there; the demo itself is not in our namespace, and neither is anything of it.
        assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == wanted
        ours = os.stat("/proc/self/ns/net").st_ino
        assert all(os.stat(f"/proc/{pid}/ns/net").st_ino not in (ours, wanted) for pid in _inhabitants(process.pid))
        assert (kernel_state(None), kernel_state(elsewhere)) == before
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert (process.returncode, json.loads(document)["ok"]) == (0, True)
        assert left_of(process.pid) == []
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("wanted", ["no-such-netns", "/etc/passwd", "/proc/self/ns/mnt"])
def test_a_namespace_that_is_none_is_refused(wanted: str) -> None:
    done = demo("--netns", wanted, "--json")
    assert (done.returncode, done.stderr) == (4, "")
    assert json.loads(done.stdout)["error"]["kind"] == "NetnsError"


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    # As a shell's `&` and nohup(1) leave it: SIGINT reaches the whole group of a script, and is not for the demo.
    names = Path("/run/netns")
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *INTERCEPTOR, "demo", "--requests", "1"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: any(names.glob(f"itc-demo-{process.pid}-*")), "the first namespace")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "OK: 4 of 4" in out


def test_without_root_it_says_so() -> None:
    done = subprocess.run([*UNPRIVILEGED, *INTERCEPTOR, "demo"], text=True, capture_output=True, timeout=30, check=False)
    assert done.returncode == 4
    assert "run it as root" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_curl_python_is_the_client(tmp_path: Path) -> None:
    # process.find looks in fixed directories: hide curl in a mount namespace of our own.
    hide = "for path in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do test -e $path/curl && "
    hide += f"mount --bind {tmp_path / 'none'} $path/curl; done; exec \"$@\""
    (tmp_path / "none").touch(mode=0o644)
    argv = ["unshare", "--mount", "sh", "-c", hide, "sh", *INTERCEPTOR, "demo", "--json", "--requests", "1"]
    done = subprocess.run(argv, text=True, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert {flow["command"] for flow in json.loads(done.stdout)["flows"]} == {"http-client", "httpd"}


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    # The rules cannot be written: iptables is a program that fails.
    broken = tmp_path / "iptables"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    iptables = os.path.realpath(sh("which", "iptables-nft-restore").strip())
    argv = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount --bind {broken} {iptables}; exec "$@"',
        "sh",
        *INTERCEPTOR,
        "demo",
        "--backend",
        "iptables-nft",
    ]
    process = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 5, err
    assert "Traceback" not in err
    assert left_of(process.pid) == []
