"""ADD: the result is passed on, the pod is captured, and nothing else in the world is touched."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interceptor import capture
from interceptor.netns import entered
from tests.cni.agents import wait_until
from tests.cni.calling import CONTAINER, PREVIOUS, Binary, variables
from tests.cni.conftest import STATIC
from tests.rig.capturing import options
from tests.rig.kernel import snapshot, written
from tests.rig.net import Pod

CONFIG = options(backend="nft")


def is_captured(pod: Pod) -> bool:
    """Whether the pod holds exactly the rules of the entry that Binary.config() gives."""
    return not capture.check(CONFIG, netns=pod.name).differences


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_the_result_is_passed_on_and_the_pod_captured(binary: Binary, pod: Pod, version: str) -> None:
    done = binary.call("ADD", pod.path, binary.config(version))
    families = {"version": "4"}, {"version": "6"}
    ips = [{**ip, **(family if version < "1.0.0" else {})} for ip, family in zip(PREVIOUS["ips"], families, strict=True)]
    assert (done.status, done.object) == (0, {**PREVIOUS, "cniVersion": version, "ips": ips})
    assert is_captured(pod)


def test_fields_of_1_1_0_and_unknown_ones_survive(binary: Binary, pod: Pod) -> None:
    previous = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0", "mtu": 0, "socketPath": "/x", "pciID": ""}],
        "ips": [],
        "routes": [{"dst": "::/0", "mtu": 1400, "advmss": 0, "priority": 5, "table": 0, "scope": 0}],
        "dns": {"nameservers": ["10.0.0.1"]},
        "vendor.example/x": {"deep": [1, 2.5, None, True, "ü"]},
    }
    assert binary.call("ADD", pod.path, binary.config("1.1.0", prevResult=previous)).object == previous


def test_a_previous_result_without_version_is_of_the_configurations(binary: Binary, pod: Pod) -> None:
    previous = {key: value for key, value in PREVIOUS.items() if key != "cniVersion"}
    assert binary.call("ADD", pod.path, binary.config("1.0.0", prevResult=previous)).object == PREVIOUS


@pytest.mark.parametrize("previous", [None, "x", 3, [], {"cniVersion": "9.9.9"}, {"ips": "x"}, {"ips": [3]}, {"ips": [{}]}])
def test_without_a_usable_previous_result_nothing_is_done(binary: Binary, pod: Pod, previous: Any) -> None:
    before = written(pod)
    assert binary.call("ADD", pod.path, binary.config(prevResult=previous)).code == 7
    assert written(pod) == before


def test_keys_that_the_specification_reserves_are_taken(binary: Binary, pod: Pod) -> None:
    config = binary.config(
        runtimeConfig={"portMappings": [], "ips": [], "mac": "02:00:00:00:00:02"},
        args={"cni": {"ips": ["10.0.0.1"]}},
        capabilities={"portMappings": True},
        **{"cni.dev/attachments": [], "cni.dev/valid-attachments": None},
    )
    arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=x;K8S_POD_UID=a=b"
    assert binary.call("ADD", pod.path, config, CNI_ARGS=arguments).status == 0


def test_the_host_is_not_touched(binary: Binary, pod: Pod) -> None:
    before = snapshot(binary.runtime)
    for command in ("ADD", "CHECK", "DEL"):
        assert binary.call(command, pod.path).status == 0
    assert snapshot(binary.runtime) == before


@pytest.mark.parametrize("table", ["133", "1330"])
def test_tproxys_routes_come_and_go(binary: Binary, pod: Pod, table: str) -> None:
    """They are written without pyroute2 by the static file, which has no packages."""
    empty = snapshot(pod)
    given = {"backend": "nft", "outbound": "tproxy", "inbound": "tproxy", "tproxy_table": int(table)}
    assert binary.call("ADD", pod.path, binary.config(capture=given)).status == 0
    wanted = options(backend="nft", outbound="tproxy", inbound="tproxy", tproxy_table=table)
    assert capture.check(wanted, netns=pod.name).differences == ()
    for family in ("-4", "-6"):
        assert f"lookup {table} proto 137" in pod.run("ip", family, "rule")
    assert binary.call("DEL", pod.path).status == 0
    assert snapshot(pod) == empty


@pytest.fixture
def leftover(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A path where a namespace should be, and is none."""
    path = tmp_path / "netns"
    match request.param:
        case "file":
            path.write_text("")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "uts":
            path = Path("/proc/self/ns/uts")
    return str(path)


@pytest.mark.parametrize("leftover", ["missing", "file", "directory", "fifo", "uts"], indirect=True)
def test_what_is_no_network_namespace_is_refused(binary: Binary, leftover: str) -> None:
    before = snapshot(binary.runtime)
    assert binary.call("ADD", leftover).code == 8
    assert snapshot(binary.runtime) == before


def test_the_runtimes_own_namespace_is_refused(binary: Binary) -> None:
    before = snapshot(binary.runtime)
    assert binary.call("ADD", binary.runtime.path).code == 8
    assert snapshot(binary.runtime) == before


@pytest.fixture
def sleeper(pod: Pod) -> Iterator[int]:
    """The pid of a process in the pod."""
    with entered(pod.path):
        running = subprocess.Popen(["sleep", "60"])
    yield running.pid
    running.kill()
    running.wait()


def test_a_namespace_is_found_by_any_path(binary: Binary, pod: Pod, sleeper: int, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(pod.path)
    paths = (pod.path, f"/var{pod.path}", f"/proc/{sleeper}/ns/net", str(link))
    assert [binary.call("ADD", path).status for path in paths if os.path.exists(path)][1:] != []
    assert all(binary.call("ADD", path).status == 0 for path in paths if os.path.exists(path))
    assert is_captured(pod)


def test_a_second_add_touches_nothing(binary: Binary, pod: Pod) -> None:
    assert binary.call("ADD", pod.path).status == 0
    before = written(pod)
    assert binary.call("ADD", pod.path).status == 0
    assert before.is_untouched_in(written(pod))


def test_add_and_del_can_be_repeated(binary: Binary, pod: Pod) -> None:
    empty = snapshot(pod)
    for _ in range(3):
        assert binary.call("ADD", pod.path).status == 0
        assert is_captured(pod)
        assert binary.call("DEL", pod.path).status == 0
        assert snapshot(pod) == empty


def test_a_long_configuration_passes(binary: Binary, pod: Pod) -> None:
    previous = {**PREVIOUS, "vendor.example/x": "x" * (1 << 20)}
    assert binary.call("ADD", pod.path, binary.config(prevResult=previous)).object == previous


def test_a_malformed_option_is_named_and_nothing_done(binary: Binary, pod: Pod) -> None:
    before = written(pod)
    done = binary.call("ADD", pod.path, binary.config(capture={"outbound_port": 0, "exclude_uids": "x", "colour": "red"}))
    assert done.code == 7
    assert all(name in done.object["details"] for name in ("outbound_port", "exclude_uids", "colour"))
    assert written(pod) == before


def test_an_unknown_key_of_the_entry_is_named(binary: Binary, pod: Pod) -> None:
    done = binary.call("ADD", pod.path, binary.config(onFailur="bypass", agentSockets="/x"))
    assert done.code == 7
    assert "onFailur:" in done.object["details"]
    assert "agentSockets:" in done.object["details"]


def test_the_runtimes_wish_goes_over_the_conflist_and_arguments_over_both(binary: Binary, pod: Pod) -> None:
    config = binary.config(
        capture={"backend": "nft", "outbound_port": 15101, "inbound_port": 15106},
        runtimeConfig={"interceptor": {"outbound_port": 15201, "exclude_outbound_ports": [22, "6000-6100"]}},
    )
    done = binary.call("ADD", pod.path, config, CNI_ARGS="IgnoreUnknown=1;INTERCEPTOR_EXCLUDE_OUTBOUND_PORTS=25")
    assert done.status == 0
    wanted = options(backend="nft", outbound_port="15201", inbound_port="15106", exclude_outbound_ports="25")
    assert capture.check(wanted, netns=pod.name).differences == ()


# CONVENTIONS.md says "servers"; containerd writes "Servers".
@pytest.mark.parametrize("key", ["servers", "Servers"])
def test_dns_is_captured_to_the_resolvers_that_the_pod_will_have(binary: Binary, pod: Pod, key: str) -> None:
    config = binary.config(
        capture={"backend": "nft", "dns": "resolv-conf"}, runtimeConfig={"dns": {key: ["10.96.0.10", "fd00::a"]}}
    )
    assert binary.call("ADD", pod.path, config).status == 0
    wanted = options(backend="nft", dns="resolv-conf")
    assert capture.check(wanted, netns=pod.name, resolvers=("10.96.0.10", "fd00::a")).differences == ()


def test_a_pod_that_cannot_be_captured_starts_only_where_the_entry_says_so(binary: Binary, pod: Pod) -> None:
    before = snapshot(pod)
    impossible = {"backend": "nft", "proxy_cgroup": "no/such/cgroup"}
    assert binary.call("ADD", pod.path, binary.config(capture=impossible)).code == 7
    done = binary.call("ADD", pod.path, binary.config(capture=impossible, onFailure="bypass"))
    assert (done.status, done.object) == (0, PREVIOUS)
    assert "NOT captured, since onFailure is bypass" in done.stderr
    assert snapshot(pod) == before


def test_unknown_resolvers_are_an_error_and_no_hole(binary: Binary, pod: Pod) -> None:
    done = binary.call("ADD", pod.path, binary.config(capture={"backend": "nft", "dns": "resolv-conf"}))
    assert done.code == 7
    assert '"dns": true' in done.object["details"]


@pytest.mark.parametrize("descriptor", [2, 0], ids=["stderr", "stdin"])
def test_a_closed_descriptor_does_no_harm(binary: Binary, pod: Pod, descriptor: int) -> None:
    script = 'exec "$0" %s>&-' % (descriptor or "0")
    with entered(binary.runtime.path):
        done = subprocess.run(
            ["/bin/sh", "-c", script, *binary.argv],
            input=json.dumps(binary.config()).encode(),
            env=variables("ADD", pod.path, {}),
            stdout=subprocess.PIPE,
            check=False,
            timeout=20,
        )
    found = json.loads(done.stdout)
    assert (done.returncode, found.get("code")) == ((0, None) if descriptor == 2 else (1, 6))


def test_stdin_that_cannot_be_read_is_no_json(runtime: Pod, pod: Pod) -> None:
    folder = os.open("/", os.O_RDONLY)
    with entered(runtime.path):
        done = subprocess.run(
            [str(STATIC)], stdin=folder, env=variables("ADD", pod.path, {}), capture_output=True, check=False, timeout=20
        )
    os.close(folder)
    assert json.loads(done.stdout)["code"] == 6


def test_pipes_that_do_not_block_lose_nothing(binary: Binary, pod: Pod) -> None:
    previous = {**PREVIOUS, "vendor.example/x": "x" * (1 << 20)}
    (stdin, its_stdin), (its_stdout, stdout) = os.pipe(), os.pipe()
    os.set_blocking(stdin, False)
    os.set_blocking(stdout, False)
    with entered(binary.runtime.path):
        running = subprocess.Popen(binary.argv, stdin=stdin, stdout=stdout, env=variables("ADD", pod.path, {}))
    os.close(stdin)
    os.close(stdout)
    # It waits for stdin, and then for somebody to read: both before there is anything.
    wait_until(lambda: Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SZ", running)
    with open(its_stdin, "wb") as file:
        file.write(json.dumps(binary.config(prevResult=previous)).encode())
    capacity = fcntl.fcntl(its_stdout, fcntl.F_GETPIPE_SZ)
    wait_until(lambda: struct.unpack("=i", fcntl.ioctl(its_stdout, termios.FIONREAD, b"    "))[0] == capacity, running)
    with open(its_stdout, "rb") as answer:
        assert json.loads(answer.read()) == previous
    assert running.wait(20) == 0


def test_a_hostile_environment_does_no_harm(binary: Binary, pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('json of the attacker')")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('sitecustomize of the attacker')")
    hostile = dict.fromkeys(("PYTHONPATH", "HOME", "TMPDIR", "PYTHONUSERBASE"), str(tmp_path))
    done = binary.call("ADD", pod.path, PYTHONSTARTUP=str(tmp_path / "json.py"), PATH="/nowhere", LANG="xx_YY.UTF-8", **hostile)
    assert done.status == 0
    assert is_captured(pod)


def test_few_descriptors_are_enough(binary: Binary, pod: Pod) -> None:
    with entered(binary.runtime.path):
        done = subprocess.run(
            binary.argv,
            input=json.dumps(binary.config()).encode(),
            env=variables("ADD", pod.path, {}),
            capture_output=True,
            check=False,
            timeout=20,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)),
        )
    assert done.returncode == 0, done


def test_what_is_no_utf8_can_be_told(binary: Binary, pod: Pod) -> None:
    off = {"backend": "nft", "outbound": "off", "inbound": "off"}
    done = binary.call(
        "ADD", pod.path, binary.config(capture=off), CNI_ARGS=os.fsdecode(b"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=\xff")
    )
    assert done.status == 0
    assert "not captured" in done.stderr


def test_the_name_in_messages_is_the_pods(binary: Binary, pod: Pod) -> None:
    off = {"backend": "nft", "outbound": "off", "inbound": "off"}
    done = binary.call("ADD", pod.path, binary.config(capture=off), CNI_ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web")
    assert done.status == 0
    assert done.stderr.startswith("interceptor-cni: shop/web: not captured: ")
    assert CONTAINER not in done.stderr


def test_the_static_file_says_that_it_cannot_capture_at_connect(runtime: Pod, pod: Pod) -> None:
    binary = Binary((str(STATIC),), runtime)
    wanted = {"outbound": "connect", "capture_cgroup": "/"}
    before = snapshot(pod)
    for command in ("ADD", "CHECK"):
        done = binary.call(command, pod.path, binary.config(capture=wanted))
        assert done.code == 101
        assert "agentSocket" in done.object["details"]
    status = binary.call("STATUS", None, binary.config("1.1.0", capture=wanted, prevResult=None))
    assert status.code == 50
    assert "agentSocket" in status.object["details"]
    assert snapshot(pod) == before


def test_what_others_capture_at_connect_is_nothing_to_the_static_file(runtime: Pod, pod: Pod) -> None:
    pinned = 'mount -t tmpfs none /sys/fs/bpf && mkdir -p /sys/fs/bpf/interceptor/connect-1 && exec "$0"'
    binary = Binary(("unshare", "-m", "sh", "-c", pinned, str(STATIC)), runtime)
    for command in ("ADD", "CHECK", "DEL"):
        done = binary.call(command, pod.path)
        assert (done.status, done.stderr) == (0, "")
