"""A connection of which one side is silent and the other has ended outlives the time after which conntrack forgets such."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.proxy.pods import (
    APP_PORT,
    DEADLINE_S,
    INBOUND,
    OUTBOUND,
    REDIRECT_RULES,
    V4,
    V6,
    Pods,
    client,
    listen,
    pods,
    proxy,
    run,
)

pytestmark = pytest.mark.netns
FORGOTTEN_AFTER_S = 3
NOT_CAPTURED = 9999
LISTENERS = [
    (direction, "redirect", port, family)
    for direction, port in (("outbound", OUTBOUND), ("inbound", INBOUND))
    for family in ("v4", "v6")
]
# Of the namespace: half-closed connections are forgotten soon. What the rules leave alone shows when that has happened.
SYSCTLS = [f"net.netfilter.nf_conntrack_tcp_timeout_{state}={FORGOTTEN_AFTER_S}" for state in ("fin_wait", "close_wait")]
RULES = REDIRECT_RULES.replace("ip daddr 127", f"tcp dport {NOT_CAPTURED} return\n    ip daddr 127")


@pytest.fixture(scope="module")
def pod() -> Iterator[Pods]:
    with pods("halfclosed") as made:
        made.rules(RULES)
        for each in SYSCTLS:
            run("ip", "netns", "exec", made.pod, "sysctl", "-q", "-w", each)
        yield made


def tracked(where: str, sock: socket.socket) -> str:
    """conntrack's entry of the connection whose client is `sock`."""
    port = str(sock.getsockname()[1])
    return run("ip", "netns", "exec", where, "conntrack", "-L", "-p", "tcp", "--orig-port-src", port)


@contextmanager
def half_closed(near: str, far: str, ip: str, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection whose client has ended its stream, as its server knows: the client's end and the server's."""
    with listen(far, ip, port) as listening, client(near, ip, port) as one:
        other, _ = listening.accept()
        with other:
            other.settimeout(DEADLINE_S)
            one.shutdown(socket.SHUT_WR)
            assert other.recv(1) == b""
            yield one, other


@pytest.mark.slow
@pytest.mark.parametrize("relay", ["splice", "copy"])
@pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_conntrack_does_not_cut_a_half_closed_connection(pod: Pods, direction: str, net: dict[str, str], relay: str) -> None:
    ends = (pod.pod, pod.far, net["far"], 7100) if direction == "outbound" else (pod.far, pod.pod, net["pod"], APP_PORT)
    with (
        proxy(pod.pod, listeners=LISTENERS, relay=relay) as running,
        half_closed(*ends) as (near, far),
        half_closed(pod.pod, pod.far, net["far"], NOT_CAPTURED) as (unasked, _),
    ):
        # Begun later, and nobody asks its peers: when it is forgotten, so would be the other.
        deadline = time.monotonic() + 10 * FORGOTTEN_AFTER_S
        while tracked(pod.pod, unasked):
            assert time.monotonic() < deadline, tracked(pod.pod, unasked)
        far.sendall(b"late")
        assert near.recv(10) == b"late"
        far.close()
        assert near.recv(10) == b""
        flow = running.flow()
    assert (flow["direction"], flow["reason"], flow["bytes_received"]) == (direction, "closed", 4)
