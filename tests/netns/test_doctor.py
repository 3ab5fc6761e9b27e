"""`doctor` says what is there, changes nothing, and agrees with what `init` then does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.rig.client import wait_until
from tests.rig.connecting import attached, own_bpffs, own_cgroup
from tests.rig.kernel import snapshot
from tests.rig.net import Pod, pods, sysctl
from tests.rig.sockets import open_socket

RELEASE = tuple(map(int, os.uname().release.split(".")[:2]))
SINCE = {"packet splice": (6, 6), "connect-time capture": (5, 14)}
UNPRIVILEGED = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all")


def on_bpffs(mounted: str) -> tuple[str, ...]:
    """What runs a program that sees at /sys/fs/bpf what `mounted`, as arguments of mount(8), puts there."""
    return ("unshare", "--mount", "sh", "-c", f'mount {mounted} /sys/fs/bpf && exec "$@"', "sh")


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    """A namespace with lo alone."""
    with pods(1) as (made,):
        yield made


def doctor(*arguments: str, user: tuple[str, ...] = ()) -> tuple[int, dict[str, dict[str, object]]]:
    """The exit code, and the findings by name."""
    argv = [*user, sys.executable, "-m", "interceptor", "doctor", "--json", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode in (0, 6), done.stderr
    return done.returncode, {found["name"]: found for found in json.loads(done.stdout)["findings"]}


@pytest.mark.iptables
def test_every_mechanism_works_here_with_every_backend(pod: Pod) -> None:
    code, found = doctor("--netns", pod.name)

    assert code == 0
    assert found["this configuration"]["status"] == "ok"
    assert found["backends"]["found"] == "usable: nft, iptables-nft, iptables-legacy, libiptc (not tried)"
    for name in ("redirect", "owner match", "tproxy", "conntrack zones", "conntrack timeouts", "original source"):
        assert found[name]["by_backend"] == {"nft": "", "iptables-nft": "", "iptables-legacy": ""}


def test_nothing_is_changed(pod: Pod) -> None:
    before = snapshot(pod)
    doctor("--netns", pod.name)
    assert snapshot(pod) == before


def test_packet_splice_and_connect_are_tried_and_leave_nothing(pod: Pod) -> None:
    with own_bpffs() as bpffs, own_cgroup() as cgroup:
        _, found = doctor("--netns", pod.name, user=on_bpffs(f"--bind {bpffs}"))
        left = os.listdir(bpffs), attached(cgroup)

    works = {name: found[name]["status"] == "ok" for name in SINCE}
    assert works == {name: version <= RELEASE for name, version in SINCE.items()}
    assert "interceptor" not in left[0]
    assert left[1] == 0


def test_what_connect_lacks_is_said_as_init_says_it(pod: Pod) -> None:
    _, found = doctor("--netns", pod.name, user=on_bpffs("-t tmpfs nothing"))

    assert found["connect-time capture"]["status"] == "missing"
    assert "mount -t bpf" in str(found["connect-time capture"]["found"])


def test_a_configuration_that_cannot_be_used_exits_6(pod: Pod) -> None:
    code, found = doctor("--netns", pod.name, "--proxy-cgroup", "no/such/group")

    assert code == 6
    assert found["this configuration"]["status"] == "missing"
    assert "cgroup" in str(found["this configuration"]["advice"])


def test_who_holds_a_port_is_named(pod: Pod) -> None:
    with open_socket(pod, socket.SOCK_STREAM, "127.0.0.1:0") as listener:
        listener.bind(("0.0.0.0", 15006))
        listener.listen()
        _, found = doctor("--netns", pod.name)

    assert f"pid {os.getpid()}" in str(found["port 15006 (inbound)"]["found"])
    assert found["port 15001 (outbound)"]["found"] == "nobody listens"


def test_two_processes_of_the_proxys_uid_are_a_warning(pod: Pod) -> None:
    sleepers = [
        subprocess.Popen(["ip", "netns", "exec", pod.name, "setpriv", "--reuid", "1337", "cat"], stdin=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for each in sleepers:
            wait_until(lambda pid=each.pid: os.stat(f"/proc/{pid}").st_uid == 1337, f"{each.pid} runs under 1337")
        _, found = doctor("--netns", pod.name)
    finally:
        for each in sleepers:
            each.communicate()

    uid = found["processes of uid 1337"]
    assert uid["status"] == "warn"
    assert all(f"pid {each.pid}" in str(uid["found"]) for each in sleepers)


@pytest.mark.parametrize(
    ("name", "value", "finding", "options"),
    [
        pytest.param("core/somaxconn", "128", "somaxconn", (), id="backlog"),
        pytest.param("ipv4/ip_forward", "0", "ip_forward", ("--virtual-interfaces", "docker0"), id="forwarding"),
        pytest.param("ipv6/conf/lo/disable_ipv6", "1", "ipv6", (), id="no IPv6 on lo"),
        pytest.param("ipv4/conf/all/src_valid_mark", "1", "src_valid_mark", ("--inbound", "tproxy"), id="source by mark"),
    ],
)
def test_a_switch_that_hurts_is_a_warning(name: str, value: str, finding: str, options: tuple[str, ...], pod: Pod) -> None:
    with sysctl(pod, name, value):
        code, found = doctor("--netns", pod.name, *options)

    assert code == 0
    assert found[finding]["status"] == "warn"
    assert found[finding]["advice"] != ""


def test_without_privilege_it_says_what_it_could_not_try() -> None:
    code, found = doctor(user=UNPRIVILEGED)

    assert code == 0
    assert found["mechanisms"]["status"] == "unknown"
    assert "CAP_SYS_ADMIN" in str(found["mechanisms"]["found"])
    assert "redirect" not in found
