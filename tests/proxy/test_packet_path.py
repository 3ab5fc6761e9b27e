"""Path MTU discovery works end to end through spliced flows: the router's errors reach whoever sent what was too big."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from interceptor import capture
from interceptor.config import Config
from tests.proxy.conversations import read_all
from tests.proxy.pods import DEADLINE_S, INBOUND, OUTBOUND, client, listen, proxy
from tests.rig.net import Pod, ip, pods, wire

pytestmark = pytest.mark.netns
PORT = 7500
POD = {"v4": "10.78.1.1", "v6": "fd78:1::1"}
FAR = {"v4": "10.78.2.1", "v6": "fd78:2::1"}
ROUTER = {"v4": ("10.78.1.2", "10.78.2.2"), "v6": ("fd78:1::2", "fd78:2::2")}
SIZE = {"v4": 24, "v6": 64}
SMALL_MTU = 1300
TOLD_MSS = {"v4": 1460, "v6": 1440}  # both ends think that the path takes 1500 bytes


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[Pod, Pod]]:
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
        yield pod, far


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_who_sends_too_much_at_once_is_told(ends: tuple[Pod, Pod], direction: str, family: str) -> None:
    pod, far = ends
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
        # From the pod's side, towards the small link.
        speaker, hearer = (calling, answering) if direction == "outbound" else (answering, calling)
        speaker.sendall(bytes(200_000))
        speaker.shutdown(socket.SHUT_WR)
        assert len(read_all(hearer)) == 200_000
        hearer.close()
        assert read_all(speaker) == b""
        speaker.close()
        assert running.flow()["relay"] == "packet"
