"""A smaller link on the way of spliced flows: who sent too much is told (path MTU discovery), or its packets are fragmented."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from interceptor import capture
from interceptor.config import Config
from interceptor.netns import entered
from tests.proxy.conversations import read_all
from tests.proxy.pods import DEADLINE_S, INBOUND, OUTBOUND, ProxyProcess, client, listen, proxy
from tests.rig.net import Pod, ip, pods, sysctl, wire

pytestmark = pytest.mark.netns
PORT = 7500
POD = {"v4": "10.78.1.1", "v6": "fd78:1::1"}
FAR = {"v4": "10.78.2.1", "v6": "fd78:2::1"}
ROUTER = {"v4": ("10.78.1.2", "10.78.2.2"), "v6": ("fd78:1::2", "fd78:2::2")}
SIZE = {"v4": 24, "v6": 64}
SMALL_MTU = 1300
SAID = 200_000
TOLD_MSS = {"v4": 1460, "v6": 1440}  # both ends think that the path takes 1500 bytes


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[Pod, Pod, Pod]]:
    """pod --1500-- router --1300-- far"""
    with pods(3) as (pod, router, far):
        families = ("v4", "v6")
        at = lambda address, family: f"{address[family]}/{SIZE[family]}"  # noqa: E731
        near = [f"{ROUTER[family][0]}/{SIZE[family]}" for family in families]
        away = [f"{ROUTER[family][1]}/{SIZE[family]}" for family in families]
        wire(pod, router, ("eth0", "eth0"), ([at(POD, family) for family in families], near))
        wire(router, far, ("eth1", "eth0"), (away, [at(FAR, family) for family in families]))
        router.sysctl("ipv4/ip_forward", "1")
        router.sysctl("ipv6/conf/all/forwarding", "1")
        for where, gateway in ((pod, 0), (far, 1)):
            for family in families:
                ip(f"route add default via {ROUTER[family][gateway]} advmss {TOLD_MSS[family]}\n", where)
        ip(f"link set eth1 mtu {SMALL_MTU}\n", router)
        yield pod, far, router


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_who_sends_too_much_at_once_is_told(ends: tuple[Pod, Pod, Pod], direction: str, family: str) -> None:
    pod, far, _ = ends
    with spliced(pod, far, direction, family) as (running, calling, answering):
        # From the pod's side, towards the small link.
        speaker, hearer = (calling, answering) if direction == "outbound" else (answering, calling)
        say_all(speaker, hearer)
        assert running.flow()["relay"] == "packet"


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_fragments_arrive(ends: tuple[Pod, Pod, Pod], direction: str) -> None:
    """Far does not ask routers to say so (no DF), and the link to the pod is the small one."""
    pod, far, router = ends
    ip(f"link set eth0 mtu {SMALL_MTU}\n", router)
    ip("link set eth1 mtu 1500\n", router)
    for end in (pod, far):
        ip("route flush cache\n", end)  # what the other tests' connections have learned of the way
    try:
        with sysctl(far, "ipv4/ip_no_pmtu_disc", "1"), spliced(pod, far, direction, "v4") as (running, calling, answering):
            before = counted(router, "FragOKs"), counted(pod, "ReasmOKs")
            speaker, hearer = (answering, calling) if direction == "outbound" else (calling, answering)
            say_all(speaker, hearer)
            flow = running.flow()
            # In the pod, whoever the translated fragments are for puts them together.
            assert counted(router, "FragOKs") > before[0]
            assert counted(pod, "ReasmOKs") > before[1]
    finally:
        ip("link set eth0 mtu 1500\n", router)
        ip(f"link set eth1 mtu {SMALL_MTU}\n", router)
    assert flow["relay"] == "packet"
    assert flow["bytes_received" if direction == "outbound" else "bytes_sent"] == SAID


def counted(where: Pod, name: str) -> int:
    """A counter of IPv4 in /proc/net/snmp."""
    with entered(where.path), open("/proc/thread-self/net/snmp", encoding="ascii") as file:
        names, values = (line.split()[1:] for line in file if line.startswith("Ip:"))
    return int(dict(zip(names, values, strict=True))[name])


def say_all(speaker: socket.socket, hearer: socket.socket) -> None:
    """Much, FIN, and FIN."""
    speaker.sendall(bytes(SAID))
    speaker.shutdown(socket.SHUT_WR)
    assert len(read_all(hearer)) == SAID
    hearer.close()
    assert read_all(speaker) == b""
    speaker.close()


@contextmanager
def spliced(pod: Pod, far: Pod, direction: str, family: str) -> Iterator[tuple[ProxyProcess, socket.socket, socket.socket]]:
    """A packet proxy in the pod, and both ends of a connection through it: who called, who answered."""
    modes = {"outbound": "off", "inbound": "off", direction: "redirect"}
    capture.enable(Config(backend="nft", **modes), netns=pod.name)  # type: ignore[arg-type]
    caller, called, address = (pod, far, FAR[family]) if direction == "outbound" else (far, pod, POD[family])
    port = OUTBOUND if direction == "outbound" else INBOUND
    with ExitStack() as stack:
        running = stack.enter_context(proxy(pod.name, listeners=[(direction, "redirect", port, family)], relay="packet"))
        server = stack.enter_context(listen(called.name, address, PORT))
        calling = stack.enter_context(client(caller.name, address, PORT))
        answering = stack.enter_context(server.accept()[0])
        answering.settimeout(DEADLINE_S)
        yield running, calling, answering
