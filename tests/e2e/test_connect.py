"""`--outbound connect` as a user starts it: init, check, proxy, clean, by a real application in the captured cgroup."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from interceptor.netns import entered
from tests.rig.client import APP_UID, Answer, Question, ask, ask_all, wait_until
from tests.rig.connecting import own_bpffs, own_cgroup
from tests.rig.net import Pod, ip, pods, wire
from tests.rig.servers import Server, serving
from tests.rig.sockets import identity

pytestmark = [pytest.mark.netns, pytest.mark.default_relay]
NETS = {"v4": ("10.9.0.1", "10.9.0.2"), "v6": ("fd09::1", "fd09::2")}
EXCLUDED = 81
SO_BINDTODEVICE = 25  # asm-generic/socket.h
IPPROTO_MPTCP = 262  # linux/in.h
MSG_FASTOPEN = 0x20000000  # linux/socket.h
TCP_FASTOPEN_CONNECT = 30  # linux/tcp.h


@dataclass
class Place:
    """A pod that is captured, another one that serves, and the bpffs in which the programs stay."""

    pod: Pod
    far: Pod
    cgroup: str
    bpffs: str
    flows: list[dict[str, Any]] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)

    def interceptor(self, verb: str, *arguments: str) -> list[str]:
        """What runs a verb in the pod, where /sys/fs/bpf is the test's own."""
        at = ["--netns", self.pod.name]
        own = [sys.executable, "-m", "interceptor", verb, *at, *arguments]
        return ["unshare", "--mount", "sh", "-c", f'mount --bind {self.bpffs} /sys/fs/bpf && exec "$@"', "sh", *own]

    def run(self, verb: str, *arguments: str) -> str:
        """Run a verb to its end; its stdout."""
        return subprocess.run(self.interceptor(verb, *arguments), check=True, capture_output=True, text=True).stdout

    @property
    def options(self) -> list[str]:
        return ["--outbound", "connect", "--capture-cgroup", self.cgroup, "--exclude-outbound-ports", str(EXCLUDED)]

    def socket(self, family: str, uid: int = APP_UID) -> socket.socket:
        """A TCP socket in the pod."""
        with entered(self.pod.path), identity(uid, uid):
            sock = socket.socket(socket.AF_INET if family == "v4" else socket.AF_INET6)
        sock.settimeout(5)
        return sock


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with own_bpffs() as bpffs, own_cgroup("pod") as cgroup, pods(2) as (pod, far), serving() as servers:
        ends = [[f"{net[end]}/{24 if '.' in net[end] else 64}" for net in NETS.values()] for end in (0, 1)]
        wire(pod, far, ("eth0", "eth0"), (ends[0], ends[1]))
        ip(f"route add default via {NETS['v4'][1]}\nroute add default via {NETS['v6'][1]}\n", pod)
        servers.listen(Server("far", far, uid=0), 80, EXCLUDED)
        servers.listen(Server("app", pod, uid=APP_UID), 80)
        yield Place(pod, far, cgroup, bpffs)


@pytest.fixture
def proxied(place: Place) -> Iterator[Place]:
    """The pod with capture and a running proxy; ended and cleaned after the test."""
    place.flows.clear()
    place.run("init", *place.options)
    argv = place.interceptor("proxy", *place.options, "--json")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as proxy:
        assert proxy.stderr is not None
        assert "outbound connect 15001/v4" in proxy.stderr.readline()
        try:
            yield place
        finally:
            _end(proxy)
            place.run("clean")


def _end(proxy: subprocess.Popen[str]) -> None:
    proxy.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        proxy.communicate(timeout=20)
    proxy.kill()


@contextmanager
def reported(place: Place, *more: str) -> Iterator[None]:
    """Within the block connections are made; after it their records and the proxy's counters are in `place`.

    more: options of the proxy.
    """
    place.flows.clear()
    place.run("init", *place.options)
    argv = place.interceptor("proxy", *place.options, *more, "--json")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as proxy:
        assert proxy.stderr is not None
        proxy.stderr.readline()
        try:
            yield
        finally:
            proxy.send_signal(signal.SIGTERM)
            stdout, stderr = proxy.communicate(timeout=20)
            place.run("clean")
    place.flows += [json.loads(line) for line in stdout.splitlines()]
    place.counters = json.loads(stderr.splitlines()[-1])


def said(sock: socket.socket) -> str:
    """Which server answers."""
    return str(json.loads(sock.recv(2048).partition(b"\n")[0])["server"])


@pytest.mark.parametrize("family", NETS)
def test_captured_reported_and_hidden_from_the_application(place: Place, family: str) -> None:
    to = NETS[family][1]
    with reported(place), place.socket(family) as sock, place.socket(family) as direct, identity(APP_UID, APP_UID):
        sock.connect((to, 80))
        assert sock.getpeername()[:2] == (to, 80)
        assert sock.getsockname()[0] == {"v4": NETS["v4"][0], "v6": "::1"}[family]
        assert said(sock) == "far"
        direct.connect((to, EXCLUDED))
        assert said(direct) == "far"
        assert direct.getsockname()[0] == NETS[family][0]
    (flow,) = place.flows
    assert (flow["original_dst"], flow["uid"]) == (f"[{to}]:80" if ":" in to else f"{to}:80", APP_UID)


def test_the_second_init_changes_nothing_and_check_agrees(place: Place) -> None:
    place.run("init", *place.options)
    assert "unchanged" in place.run("init", *place.options)
    assert place.run("check", *place.options).startswith("equal")
    explained = place.run("explain", *place.options, "--dst", NETS["v4"][1], "--uid", "1000")
    assert explained.startswith("captured: connect to the proxy's port 15001")
    assert "dport 81 -> direct" in place.run("plan", *place.options)
    place.run("clean")
    assert "nothing to remove" in place.run("clean")


@pytest.mark.parametrize("family", NETS)
def test_direct_dial_is_refused_and_counted(place: Place, family: str) -> None:
    loopback = {"v4": "127.0.0.1", "v6": "::1"}[family]
    with reported(place), place.socket(family) as sock, contextlib.suppress(ConnectionResetError):
        sock.connect((loopback, 15001))
        assert sock.recv(1) == b""
    assert place.counters["connections_refused"] == {"no_map_entry": 1}


def test_v4_mapped_destination_of_an_ipv6_socket(proxied: Place) -> None:
    with proxied.socket("v6") as sock, identity(APP_UID, APP_UID):
        sock.connect(("::ffff:" + NETS["v4"][1], 80))
        assert sock.getsockname()[0] == "::ffff:" + NETS["v4"][0]
        assert sock.getpeername()[:2] == ("::ffff:" + NETS["v4"][1], 80)
        assert said(sock) == "far"


@pytest.mark.parametrize("family", NETS)
def test_socket_that_is_bound_to_an_address_and_a_port(proxied: Place, family: str) -> None:
    own, to = NETS[family]
    with proxied.socket(family) as sock, identity(APP_UID, APP_UID):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((own, 4321))
        sock.connect((to, 80))
        assert said(sock) == "far"
        assert sock.getsockname()[:2] == (own, 4321)


@pytest.mark.parametrize("family", NETS)
def test_socket_that_is_bound_to_an_interface(proxied: Place, family: str) -> None:
    with proxied.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, b"eth0\0")
        with identity(APP_UID, APP_UID):
            sock.connect((NETS[family][1], 80))
        assert said(sock) == "far"


@pytest.mark.parametrize("family", NETS)
def test_connect_that_does_not_wait(proxied: Place, family: str) -> None:
    with proxied.socket(family) as sock, identity(APP_UID, APP_UID):
        sock.setblocking(False)
        assert sock.connect_ex((NETS[family][1], 80)) in (0, 115)
        sock.settimeout(5)
        assert said(sock) == "far"


@pytest.mark.parametrize("family", NETS)
def test_fast_open(proxied: Place, family: str) -> None:
    for _ in range(2):  # the second has a cookie, where the server gives one
        with proxied.socket(family) as sock, identity(APP_UID, APP_UID):
            sock.settimeout(None)  # else it says EINPROGRESS
            sock.sendto(b"at once", MSG_FASTOPEN, (NETS[family][1], 80))
            sock.settimeout(5)
            assert said(sock) == "far"
    with proxied.socket(family) as sock, identity(APP_UID, APP_UID):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        sock.connect((NETS[family][1], 80))
        assert sock.getpeername()[:2] == (NETS[family][1], 80)
        sock.sendall(b"with the first bytes")
        assert said(sock) == "far"


@pytest.mark.parametrize("family", NETS)
def test_port_that_is_reused_at_once_for_another_destination(place: Place, family: str) -> None:
    own, to = NETS[family]
    # Spliced packet by packet, a client's port is not free for a second after a RST: docs/packet-splice.md, Limits.
    with reported(place, "--relay", "splice"):
        for port in (80, 4000) * 20:
            with place.socket(family) as sock, identity(APP_UID, APP_UID), contextlib.suppress(ConnectionError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.bind((own, 4322))
                sock.connect((to, port))
                if port == 80:
                    sock.close()  # RST, perhaps before the proxy accepts it
                else:
                    sock.recv(1)
    wanted = {f"[{to}]:{port}" if ":" in to else f"{to}:{port}" for port in (80, 4000)}
    assert {flow["original_dst"] for flow in place.flows} <= {*wanted, None}
    arrived = [flow for flow in place.flows if flow["original_dst"] and flow["original_dst"].endswith(":4000")]
    assert len(arrived) == 20
    assert "no_map_entry" not in place.counters.get("connections_refused", {})


@pytest.mark.parametrize("family", NETS)
def test_socket_that_is_connected_a_second_time(proxied: Place, family: str) -> None:
    to = NETS[family][1]
    disconnect = struct.pack("=H14x", socket.AF_UNSPEC)
    import ctypes

    with proxied.socket(family) as sock, identity(APP_UID, APP_UID):
        sock.connect((to, 80))
        assert said(sock) == "far"
        assert ctypes.CDLL(None).connect(sock.fileno(), disconnect, len(disconnect)) == 0
        sock.connect((to, EXCLUDED))
        assert sock.getpeername()[:2] == (to, EXCLUDED)
        assert said(sock) == "far"


def test_other_namespaces_of_the_cgroup_are_left_alone(proxied: Place) -> None:
    for pod_address, far_address in NETS.values():
        to = f"[{pod_address}]:80" if ":" in pod_address else f"{pod_address}:80"
        answer = ask(proxied.far, to)
        assert answer.by == "app"
        assert answer.peer.rpartition(":")[0].strip("[]") in ("127.0.0.6", "::6", far_address), answer


@pytest.mark.parametrize("with_proxy", [False, True], ids=["alone", "proxy"])
def test_probe_connects_as_a_process_of_the_cgroup(place: Place, with_proxy: bool) -> None:
    def probed() -> dict[str, list[str]]:
        argv = place.interceptor("probe", "--json", *place.options)
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        found: dict[str, list[str]] = {}
        for result in json.loads(done.stdout):
            found.setdefault(result["direction"], []).append(f"{result['status']} {result['detail']}".strip())
        return found

    if with_proxy:
        with reported(place):
            assert probed()["outbound"] == ["ok", "ok"]
        return
    place.run("init", *place.options)
    try:
        found = probed()
        assert (found["outbound"], found["self-call"]) == (["ok", "ok"], ["ok", "ok"])
    finally:
        place.run("clean")


def test_without_inbound_no_rule_and_no_program_that_writes_one_is_needed(place: Place) -> None:
    options = [*place.options, "--inbound", "off"]
    assert "with connect (no rule is needed)" in place.run("init", *options)
    assert place.pod.run("nft", "list", "ruleset") == ""
    assert place.run("check", *options).startswith("equal: connect")
    place.run("init", *place.options)
    assert "removed the rules that nft held" in place.run("init", *options)
    place.run("clean")
    assert not os.path.exists(os.path.join(place.bpffs, "interceptor"))


def test_clean_without_options_leaves_nothing(place: Place) -> None:
    before = sorted(os.listdir(place.bpffs))
    place.run("init", *place.options)
    assert sorted(os.listdir(place.bpffs)) != before
    assert ask(place.pod, f"{NETS['v4'][1]}:80") == Answer("refused")  # captured, and no proxy
    place.run("clean")
    assert sorted(os.listdir(place.bpffs)) == before
    wait_until(lambda: ask(place.pod, f"{NETS['v4'][1]}:80").by == "far", "connections go direct again")


def test_without_a_cgroup_it_says_what_is_missing(place: Place) -> None:
    done = subprocess.run(place.interceptor("init", "--outbound", "connect"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--capture-cgroup" in done.stderr


def test_multipath_tcp(proxied: Place) -> None:
    try:
        with entered(proxied.pod.path):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    with sock, identity(APP_UID, APP_UID):
        sock.settimeout(5)
        sock.connect((NETS["v4"][1], 80))
        assert said(sock) == "far"
        assert sock.getpeername()[0].startswith("127."), "the one kind of socket that sees the proxy"


def test_many_connections_at_once(place: Place) -> None:
    targets = [f"[{net[1]}]:80" if ":" in net[1] else f"{net[1]}:80" for net in NETS.values()]
    with reported(place):
        for _ in range(10):
            asked = [Question(place.pod, to) for to in targets * 100]
            assert {(answer.by, answer.original_dst) for answer in ask_all(asked, timeout_s=20)} == {
                ("far", to) for to in targets
            }
    assert len(place.flows) == 2000
    assert "connections_refused" not in place.counters
