"""The small network that the contract suite runs in.

    guest --virt0-- pod ==eth0, eth1== far
                     |                   \\ servers on addresses of their own
                     | application, proxy

Far knows the way to guest through pod. Every address exists for both families.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.rig.client import APP_UID, PROXY_UID
from tests.rig.net import Pod, ip, pods, wire
from tests.rig.servers import Server, Servers, serving
from tests.rig.sockets import join

# What far and the application listen on, TCP and UDP. 15008 is the tunnel port.
PORTS = (53, 80, 443, 6000, 6050, 8080, 9000, 9090, 15008, 20000)
OUTBOUND, INBOUND, DNS = 15001, 15006, 15053
SECOND_OUTBOUND = 15101  # another configuration's outbound port
RESETTING = 7000  # on far: resets each connection


@dataclass(frozen=True, slots=True)
class Net:
    """One family's addresses."""

    family: str
    pod: str
    far: str
    pod_eth1: str
    far_eth1: str
    server: str
    other: str
    resolver: str
    stray_resolver: str
    guest: str
    gateway: str  # pod's, towards guest
    loopback: str
    inbound_source: str
    anywhere: str
    bits: int

    def at(self, who: str, port: int = 80) -> str:
        """`who` (a field's name) and a port, as ask() takes it."""
        return join(getattr(self, who), port)

    def cidr(self, who: str) -> str:
        """`who` alone, as a CIDR option takes it."""
        return f"{getattr(self, who)}/{self.bits}"


NETS = {
    "v4": Net(
        "v4",
        pod="10.0.1.2",
        far="10.0.1.1",
        pod_eth1="10.0.4.2",
        far_eth1="10.0.4.1",
        server="10.0.2.2",
        other="10.0.2.3",
        resolver="10.0.2.53",
        stray_resolver="10.0.2.54",
        guest="10.0.3.2",
        gateway="10.0.3.1",
        loopback="127.0.0.1",
        inbound_source="127.0.0.6",
        anywhere="0.0.0.0/0",
        bits=32,
    ),
    "v6": Net(
        "v6",
        pod="fd00:1::2",
        far="fd00:1::1",
        pod_eth1="fd00:4::2",
        far_eth1="fd00:4::1",
        server="fd00:2::2",
        other="fd00:2::3",
        resolver="fd00:2::53",
        stray_resolver="fd00:2::54",
        guest="fd00:3::2",
        gateway="fd00:3::1",
        loopback="::1",
        inbound_source="::6",
        anywhere="::/0",
        bits=128,
    ),
}


@dataclass(frozen=True, slots=True)
class World:
    """Three pods and their servers."""

    pod: Pod
    far: Pod
    guest: Pod
    servers: Servers


@contextmanager
def world() -> Iterator[World]:
    """The network, with the application's, far's and the (fake) proxy's servers running."""
    with pods(3) as (pod, far, guest), serving() as servers:
        _connect(pod, far, guest)
        servers.listen(Server("far", far, uid=0), *PORTS, OUTBOUND, INBOUND, DNS)
        servers.listen(Server("resetting", far, uid=0, resets=True), RESETTING, protos=("tcp",))
        servers.listen(Server("app", pod, uid=APP_UID), *PORTS)
        _listen_as_proxy(servers, pod)
        yield World(pod, far, guest, servers)


def _listen_as_proxy(servers: Servers, pod: Pod) -> None:
    servers.listen(Server("outbound", pod, PROXY_UID, transparent=True), OUTBOUND, SECOND_OUTBOUND)
    servers.listen(Server("inbound", pod, PROXY_UID, transparent=True), INBOUND)
    servers.listen(Server("dns", pod, PROXY_UID), DNS)


def _connect(pod: Pod, far: Pod, guest: Pod) -> None:
    both = tuple(NETS.values())
    ends = lambda left, right, size: (  # noqa: E731
        [f"{getattr(net, left)}/{size[net.family]}" for net in both],
        [f"{getattr(net, right)}/{size[net.family]}" for net in both],
    )
    link = {"v4": 24, "v6": 64}
    wire(pod, far, ("eth0", "eth0"), ends("pod", "far", link))
    wire(pod, far, ("eth1", "eth1"), ends("pod_eth1", "far_eth1", link))
    wire(pod, guest, ("virt0", "eth0"), ends("gateway", "guest", link))
    for name in ("server", "other", "resolver", "stray_resolver"):
        ip("".join(f"addr add {net.cidr(name)} dev lo\n" for net in both), far)
    for net in both:
        ip(f"route add {net.anywhere} via {net.far}\n", pod)
        ip(f"route add {net.anywhere} via {net.gateway}\n", guest)
        ip(f"route add {net.guest} via {net.pod}\n", far)
    pod.sysctl("ipv4/ip_forward", "1")
    pod.sysctl("ipv6/conf/all/forwarding", "1")
