"""The proxy known by its cgroup: nft only, and only where cgroup v2 exists."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interceptor import capture
from interceptor.errors import ConfigError
from tests.rig.capturing import options
from tests.rig.client import ANSWER_S, Answer, ask
from tests.rig.net import Pod
from tests.rig.sockets import split
from tests.rig.world import NETS, Net, World

CGROUPS = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
# nft looks cgroups up below /sys/fs/cgroup; where v2 is mounted elsewhere (hybrid), it gets a mount namespace of its own.
ENABLE = """
    import sys
    from interceptor import capture
    from tests.rig.capturing import options
    capture.enable(options(backend="nft", proxy_uid="", proxy_gid="", proxy_cgroup=sys.argv[2]), netns=sys.argv[1])
"""
DIAL = """
    import ipaddress, os, socket, sys
    from interceptor.netns import entered
    open(sys.argv[2] + "/cgroup.procs", "w").write(str(os.getpid()))
    with entered(sys.argv[1]), socket.socket(int(sys.argv[3])) as opened:
        with socket.socket(fileno=int(sys.argv[4])) as channel:
            socket.send_fds(channel, [b"."], [opened.fileno()])
"""


def test_iptables_backends_refuse_a_cgroup(backend: str) -> None:
    if backend == "nft":
        assert options(backend=backend, proxy_cgroup="a/b").proxy_cgroup == "a/b"
        return
    with pytest.raises(ConfigError, match="cgroup"):
        options(backend=backend, proxy_cgroup="a/b")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of our own, two levels deep."""
    if not CGROUPS:
        pytest.skip("no cgroup v2 is mounted here")
    outer = CGROUPS[0] / f"itc-t-{os.getpid()}"
    inner = outer / "proxy"
    inner.mkdir(parents=True)
    try:
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_proxy_by_cgroup(w: World, net: Net, cgroup: Path) -> None:
    try:
        _enable_seeing_cgroups(w.pod, str(cgroup.relative_to(CGROUPS[0])))
        assert ask(w.pod, net.at("server")) == Answer("outbound", net.at("server"))
        with _socket_of(w.pod, cgroup, net) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect(split(net.at("server")))
            assert '"server": "far"' in sock.recv(2048).decode()
    finally:
        capture.disable(netns=w.pod.name)


def _enable_seeing_cgroups(pod: Pod, path: str) -> None:
    mounted = f'mount --bind {CGROUPS[0]} /sys/fs/cgroup && exec "$@"'
    argv = ["unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", textwrap.dedent(ENABLE), pod.name, path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr


@contextmanager
def _socket_of(pod: Pod, cgroup: Path, net: Net) -> Iterator[socket.socket]:
    family = socket.AF_INET if net.family == "v4" else socket.AF_INET6
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [sys.executable, "-c", textwrap.dedent(DIAL), pod.path, str(cgroup), str(int(family)), str(theirs.fileno())]
        done = subprocess.run(argv, pass_fds=[theirs.fileno()], capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr
        _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
    with socket.socket(fileno=descriptor) as sock:
        yield sock
