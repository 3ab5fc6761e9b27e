"""Peers with odd TCP options: each is spliced and right, or relayed, right, and counted."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from interceptor import netns
from tests.proxy.conversations import converse, read_all, read_exactly
from tests.proxy.packet_world import rough, tcp_extended, until
from tests.proxy.pods import DEADLINE_S, V4, V6, Pods, ProxyProcess, family, listen, pods
from tests.proxy.test_packet import PORT, converse_through, relays, splicing

pytestmark = pytest.mark.netns
IPPROTO_MPTCP = 262  # linux/in.h
TCP_FASTOPEN = 23  # linux/tcp.h
# TFO_CLIENT_ENABLE, TFO_SERVER_ENABLE, TFO_CLIENT_NO_COOKIE, TFO_SERVER_COOKIE_NOT_REQD, TFO_SERVER_WO_SOCKOPT1, net/tcp.h
TFO_CLIENT, TFO_ANY_SERVER = 0x1 | 0x4, 0x2 | 0x200 | 0x400
DIRECTIONS = pytest.mark.parametrize("direction", ["outbound", "inbound"])
FAMILIES = pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])


@pytest.fixture(scope="module")
def world() -> Iterator[Pods]:
    """A pod and everybody else."""
    with pods("options") as made:
        yield made


@contextmanager
def sysctl(where: str, name: str, value: int) -> Iterator[None]:
    """net.ipv4.`name` of a namespace is `value` within the block."""
    before = _sysctl(where, name)
    _sysctl(where, name, str(value))
    try:
        yield
    finally:
        _sysctl(where, name, before)


def _sysctl(where: str, name: str, value: str | None = None) -> str:
    path = Path(f"/proc/sys/net/ipv4/{name}")
    with netns.entered(f"/run/netns/{where}"):
        if value is not None:
            path.write_text(value, encoding="ascii")
        return path.read_text(encoding="ascii").strip()


COUNT = 60
OFF = ("tcp_timestamps", "tcp_sack", "tcp_window_scaling")


@DIRECTIONS
@pytest.mark.parametrize("who", ["pod", "far"])
@pytest.mark.parametrize("option", OFF)
def test_an_option_that_one_end_does_without(world: Pods, option: str, who: str, direction: str) -> None:
    with sysctl(getattr(world, who), option, 0), splicing(world, "v4", direction) as running:
        converse_through(world, running, "v4", direction, COUNT)
    # The proxy's own sockets are in the pod, so that without timestamps there both legs are.
    differs = (option, who) == ("tcp_timestamps", "far")
    assert relays(running) == {"splice" if differs else "packet"}
    assert running.counters.get("relay_fallbacks", {}) == ({"timestamps": COUNT} if differs else {})


@pytest.mark.slow
@DIRECTIONS
def test_a_peer_without_sack_on_a_rough_network(world: Pods, direction: str) -> None:
    with ExitStack() as stack:
        stack.enter_context(sysctl(world.far, "tcp_sack", 0))
        running = stack.enter_context(splicing(world, "v4", direction))
        for where in (world.pod, world.far):
            stack.enter_context(rough(where, "eth0"))
        ends = (world.pod, world.far, "far") if direction == "outbound" else (world.far, world.pod, "pod")
        assert converse(ends[0], ends[1], V4[ends[2]], PORT, 40, without_resets=True) == []
        until(lambda: len(running.flows) == 40, lambda: len(running.flows))
    assert relays(running) == {"packet"}


def exchange(near: socket.socket, far: socket.socket, already: bytes = b"") -> None:
    """So much each way that it takes several windows; `already` is on its way."""
    up, down = b"u" * 300_000, b"d" * 500_000
    assert read_exactly(far, len(already)) == already
    near.sendall(up)
    assert read_exactly(far, len(up)) == up
    far.sendall(down)
    far.close()
    assert read_all(near) == down
    near.close()


def unconnected(where: str, ip: str, protocol: int = 0) -> socket.socket:
    """A stream socket inside namespace `where`."""
    with netns.entered(f"/run/netns/{where}"):
        sock = socket.socket(family(ip), socket.SOCK_STREAM, protocol)
    sock.settimeout(DEADLINE_S)
    return sock


def speaking_at_once(where: str, ip: str) -> socket.socket:
    """A client that says "hello" in its SYN."""
    sock = unconnected(where, ip)
    sock.settimeout(None)  # with one, sendto() would not wait for the handshake
    assert sock.sendto(b"hello", socket.MSG_FASTOPEN, (ip, PORT)) == 5
    sock.settimeout(DEADLINE_S)
    return sock


def finished(running: ProxyProcess, sent: int, received: int = 500_000) -> str:
    """The relay of the one flow, whose bytes must be these."""
    flow = running.flow(lambda flow: flow["original_dst"].endswith(f":{PORT}"))
    assert (flow["bytes_sent"], flow["bytes_received"], flow["reason"]) == (sent, received, "closed")
    return str(flow["relay"])


@FAMILIES
@DIRECTIONS
def test_mptcp_at_both_ends_is_plain_tcp_through_the_proxy(world: Pods, direction: str, net: dict[str, str]) -> None:
    near_at, far_at, name = (world.pod, world.far, "far") if direction == "outbound" else (world.far, world.pod, "pod")
    which = "v4" if net is V4 else "v6"
    with splicing(world, which, direction) as running, unconnected(far_at, net[name], IPPROTO_MPTCP) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((net[name], PORT))
        server.listen()
        before = tcp_extended(near_at, "MPTcpExt")["MPCapableSYNTX"]
        with unconnected(near_at, net[name], IPPROTO_MPTCP) as near:
            near.connect((net[name], PORT))
            assert tcp_extended(near_at, "MPTcpExt")["MPCapableSYNTX"] == before + 1
            far, _ = server.accept()
            far.settimeout(DEADLINE_S)
            with far:
                exchange(near, far)
        assert finished(running, 300_000) == "packet"


@FAMILIES
@DIRECTIONS
def test_a_client_that_speaks_in_its_syn_says_it_again(world: Pods, direction: str, net: dict[str, str]) -> None:
    near_at, far_at, name = (world.pod, world.far, "far") if direction == "outbound" else (world.far, world.pod, "pod")
    which = "v4" if net is V4 else "v6"
    with ExitStack() as stack:
        running = stack.enter_context(splicing(world, which, direction))
        stack.enter_context(sysctl(near_at, "tcp_fastopen", TFO_CLIENT))
        server = stack.enter_context(listen(far_at, net[name], PORT))
        server.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
        before = tcp_extended(near_at)["TCPFastOpenActiveFail"]
        near = stack.enter_context(speaking_at_once(near_at, net[name]))
        far = stack.enter_context(server.accept()[0])
        far.settimeout(DEADLINE_S)
        exchange(near, far, b"hello")
        assert tcp_extended(near_at)["TCPFastOpenActiveFail"] == before + 1
        assert finished(running, 300_005) == "packet"


@DIRECTIONS
def test_a_syn_whose_bytes_the_proxy_takes_is_relayed(world: Pods, direction: str) -> None:
    """With tcp_fastopen so, every listener does: the client's sequence numbers are not what the programs would think."""
    near_at, far_at, name = (world.pod, world.far, "far") if direction == "outbound" else (world.far, world.pod, "pod")
    with ExitStack() as stack:
        both = TFO_CLIENT | TFO_ANY_SERVER
        for where in (world.pod, world.far):
            stack.enter_context(sysctl(where, "tcp_fastopen", both))
        running = stack.enter_context(splicing(world, "v4", direction))
        server = stack.enter_context(listen(far_at, V4[name], PORT))
        before = tcp_extended(world.pod)["TCPFastOpenPassive"]
        near = stack.enter_context(speaking_at_once(near_at, V4[name]))
        far = stack.enter_context(server.accept()[0])
        far.settimeout(DEADLINE_S)
        exchange(near, far, b"hello")
        assert tcp_extended(world.pod)["TCPFastOpenPassive"] == before + 1
        assert finished(running, 300_005) == "splice"
    assert running.counters["relay_fallbacks"] == {"no_handshake": 1}


IPV6_HOPOPTS, IPV6_DSTOPTS = 54, 59  # linux/in6.h
# Level, option, and what it asks for in every packet: record the route; eight bytes of padding.
IN_EVERY_PACKET = {
    "ip_options": (V4, socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x07\x07\x04" + bytes(5)),
    "hop_by_hop": (V6, socket.IPPROTO_IPV6, IPV6_HOPOPTS, b"\0\0\x01\x04" + bytes(4)),
    "destination": (V6, socket.IPPROTO_IPV6, IPV6_DSTOPTS, b"\0\0\x01\x04" + bytes(4)),
}


@DIRECTIONS
@pytest.mark.parametrize("name", list(IN_EVERY_PACKET))
def test_ends_with_ip_options_are_spliced(world: Pods, name: str, direction: str) -> None:
    net, level, option, value = IN_EVERY_PACKET[name]
    near_at, far_at, server_at = (world.pod, world.far, "far") if direction == "outbound" else (world.far, world.pod, "pod")
    with ExitStack() as stack:
        running = stack.enter_context(splicing(world, "v4" if net is V4 else "v6", direction))
        server = stack.enter_context(listen(far_at, net[server_at], PORT))
        near = stack.enter_context(unconnected(near_at, net[server_at]))
        near.connect((net[server_at], PORT))
        far = stack.enter_context(server.accept()[0])
        far.settimeout(DEADLINE_S)
        # An accepted IPv6 socket makes no room for them (inet_daddr != LOOPBACK4_IPV6 in ipv6_update_options()): what it sends
        # is too big for a real device, with or without a proxy.
        for sock in (near,) if (net, direction) == (V6, "outbound") else (near, far):
            sock.setsockopt(level, option, value)
        exchange(near, far)
        assert finished(running, 300_000) == "packet"
