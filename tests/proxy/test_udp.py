"""UDP through the proxy, what is easily forgotten: errors, sizes, bursts, many flows. The rest is in test_captured.py."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Iterator

import pytest

from interceptor.proxy.udp import MAX_FLOWS
from tests.proxy.pods import APP_PORT, INBOUND, OUTBOUND, TPROXY_RULES, V4, V6, Pods, client, listen, pods, proxy

pytestmark = pytest.mark.netns
NETS = pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])
UDP = {
    "listeners": [("outbound", "tproxy", OUTBOUND, family) for family in ("v4", "v6")],
    "udp_listeners": [
        *(("outbound", "tproxy", OUTBOUND, family) for family in ("v4", "v6")),
        *(("inbound", "tproxy", INBOUND, family) for family in ("v4", "v6")),
    ],
}
# What UDP carries over IPv4; over IPv6, what goes over lo (MTU 65,536) in one piece: fragments lose their mark there.
LARGEST = {4: 65507, 6: 65536 - 40 - 8}


@pytest.fixture(scope="module")
def pod() -> Iterator[Pods]:
    """A pod whose UDP is brought to the proxy, both ways."""
    with pods("udp") as made:
        made.rules(TPROXY_RULES)
        made.policy_routes()
        yield made


def datagrams(where: str, ip: str, port: int) -> socket.socket:
    return client(where, ip, port, socket.SOCK_DGRAM)


@NETS
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_a_client_hears_that_nobody_is_at_the_port(pod: Pods, net: dict[str, str], direction: str) -> None:
    where, to, port = (pod.pod, net["far"], 9000) if direction == "outbound" else (pod.far, net["pod"], APP_PORT)
    with proxy(pod.pod, **UDP) as running, datagrams(where, to, port) as near:
        near.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            near.recv(100)
        flow = running.flow()
    assert (flow["direction"], flow["reason"], flow["error"]) == (direction, "upstream_failed", "ECONNREFUSED")


def test_a_client_hears_that_there_is_no_such_host(pod: Pods) -> None:
    with proxy(pod.pod, **UDP), datagrams(pod.pod, "10.77.0.99", 9000) as near:
        near.setsockopt(socket.SOL_IP, 11, 1)  # IP_RECVERR: without it, only a refusal is an error (udp(7))
        near.send(b"anybody?")
        with pytest.raises(OSError, match="No route to host") as failed:
            near.recv(100)
    assert failed.value.errno == errno.EHOSTUNREACH


@NETS
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_the_largest_datagrams_go_both_ways_whole(pod: Pods, net: dict[str, str], direction: str) -> None:
    near_at, far_at, to, port = (
        (pod.pod, pod.far, net["far"], 9000) if direction == "outbound" else (pod.far, pod.pod, net["pod"], APP_PORT)
    )
    with proxy(pod.pod, **UDP), listen(far_at, to, port, socket.SOCK_DGRAM) as server, datagrams(near_at, to, port) as near:
        for size in (LARGEST[6 if ":" in to else 4], 1472, 0, 1):
            sent = bytes(index * 7 & 0xFF for index in range(size))
            near.send(sent)
            got, peer = server.recvfrom(1 << 16)
            assert got == sent
            server.sendto(sent[::-1], peer)
            assert near.recv(1 << 16) == sent[::-1]


@NETS
def test_a_burst_is_forwarded_whole_and_in_order(pod: Pods, net: dict[str, str]) -> None:
    count = 200
    with (
        proxy(pod.pod, **UDP) as running,
        listen(pod.far, net["far"], 9000, socket.SOCK_DGRAM) as server,
        datagrams(pod.pod, net["far"], 9000) as near,
    ):
        running.process.send_signal(signal.SIGSTOP)
        for number in range(count):
            near.send(b"%d" % number)
        running.process.send_signal(signal.SIGCONT)
        seen = [server.recvfrom(100) for _ in range(count)]
        assert [int(got) for got, _ in seen] == list(range(count))
        for number in range(count):
            server.sendto(b"%d" % number, seen[0][1])
        assert [int(near.recv(100)) for _ in range(count)] == list(range(count))
        assert running.stop() == 0
    assert [(flow["bytes_sent"], flow["bytes_received"]) for flow in running.flows] == [(490, 490)]


@NETS
def test_a_thousand_datagrams_each_way_arrive_once(pod: Pods, net: dict[str, str]) -> None:
    count = 1000
    with (
        proxy(pod.pod, **UDP) as running,
        listen(pod.far, net["far"], 9000, socket.SOCK_DGRAM) as server,
        datagrams(pod.pod, net["far"], 9000) as near,
    ):
        for number in range(count):
            near.send(b"%d" % number)
            question, peer = server.recvfrom(100)
            server.sendto(question + b"!", peer)
            assert near.recv(100) == b"%d!" % number
        assert running.stop() == 0
    assert [flow["reason"] for flow in running.flows] == ["drained"]
    assert running.counters["udp_flows_opened"] == 1


def test_more_flows_than_there_may_be_are_refused_and_counted(pod: Pods) -> None:
    extra = 5
    with proxy(pod.pod, **UDP) as running, listen(pod.far, V4["far"], 9000, socket.SOCK_DGRAM) as server:
        kept = []
        try:
            for _ in range(MAX_FLOWS + extra):
                kept.append(datagrams(pod.pod, V4["far"], 9000))
                kept[-1].send(b"x")
                if len(kept) <= MAX_FLOWS:
                    server.recv(10)
            kept[0].send(b"last")
            assert server.recv(10) == b"last"
        finally:
            for each in kept:
                each.close()
        assert running.stop() == 0
    assert running.counters["connections_refused"] == {"too_many_udp_flows": extra}
