"""Network interfaces for namespaces of our own: veth pairs, addresses, routes, over rtnetlink. For `run` and `demo`.

Works in the network namespace of the calling thread. pyroute2 would do it too, for 200 ms of import.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import time
from dataclasses import dataclass
from typing import TypeAlias

from interceptor import nlattr
from interceptor.backends import netlink
from interceptor.errors import BackendError
from interceptor.values import Address, Family, Network

Interface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_GETROUTE = 16, 17, 20, 24, 26
RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 254, 3, 0, 253
RTN_UNICAST, RTN_LOCAL = 1, 2
RTA_DST, RTA_OIF = 1, 4
# linux/if_link.h, linux/if_addr.h, linux/veth.h, linux/if.h
IFLA_IFNAME, IFLA_LINKINFO, IFLA_NET_NS_FD = 3, 18, 28
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NODAD = 0x02  # an address that waits a second for its duplicate cannot be used at once
IFF_UP, IFF_RUNNING, IFF_NOARP = 0x1, 0x40, 0x80
SIOCGIFFLAGS = 0x8913  # linux/sockios.h
RUNNING_S = 5.0

NEW = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
FAMILY_NUMBER = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class End:
    """One end of a veth pair: its name, and the namespace it lives in (an open descriptor; None: here)."""

    name: str
    namespace: int | None = None


def add_veth_pair(one: End, other: End) -> None:
    """Create both ends, each in its namespace, down and without addresses."""
    peer = LINK.pack(0, 0, 0, 0, 0) + _end(other)
    data = nlattr.attr(IFLA_INFO_DATA, nlattr.attr(VETH_INFO_PEER, peer))
    link = nlattr.attr(IFLA_LINKINFO, nlattr.attr(IFLA_INFO_KIND, b"veth") + data)
    body = LINK.pack(0, 0, 0, 0, 0) + _end(one) + link
    _change(RTM_NEWLINK, NEW, body, f"creating the veth pair {one.name}, {other.name}")


def remove(name: str) -> None:
    """`ip link del NAME`; of a veth pair, both ends."""
    _change(RTM_DELLINK, 0, LINK.pack(0, 0, _index(name), 0, 0), f"removing {name}")


def set_up(name: str) -> None:
    """`ip link set NAME up`."""
    _change(RTM_NEWLINK, 0, LINK.pack(0, 0, _index(name), IFF_UP, IFF_UP), f"setting {name} up")


def wait_until_running(name: str) -> None:
    """Return once the kernel has noticed that both ends of the pair are up. Raises BackendError after RUNNING_S.

    It notices up to a second late (net/core/link_watch.c); until then IPv6 answers no neighbour, and a first packet is lost.
    """
    request = struct.pack("16sH22x", name.encode(), 0)  # struct ifreq
    deadline = time.monotonic() + RUNNING_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        while not struct.unpack_from("16sH", fcntl.ioctl(asking, SIOCGIFFLAGS, request))[1] & IFF_RUNNING:
            if time.monotonic() > deadline:
                raise BackendError(f"{name} is up and still has no carrier after {RUNNING_S:g} s")
            time.sleep(0.002)


def set_up_without_arp(name: str) -> None:
    """Up, and no neighbour is ever asked for: packets go out at once, wherever to."""
    flags = IFF_UP | IFF_NOARP
    _change(RTM_NEWLINK, 0, LINK.pack(0, 0, _index(name), flags, flags), f"setting {name} up")


def add_address(name: str, interface: Interface) -> None:
    """`ip addr add INTERFACE dev NAME nodad`."""
    family = FAMILY_NUMBER[Family.of(interface.ip)]
    packed = interface.ip.packed
    header = ADDRESS.pack(family, interface.network.prefixlen, IFA_F_NODAD, RT_SCOPE_UNIVERSE, _index(name))
    body = header + nlattr.attr(IFA_LOCAL, packed) + nlattr.attr(IFA_ADDRESS, packed)
    _change(RTM_NEWADDR, NEW, body, f"giving {name} the address {interface}")


def add_route(name: str, destination: Network) -> None:
    """`ip route add DESTINATION dev NAME`; nothing when it is there."""
    family = FAMILY_NUMBER[Family.of(destination)]
    scope = RT_SCOPE_LINK if family == socket.AF_INET else RT_SCOPE_UNIVERSE
    body = ROUTE.pack(family, destination.prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST, 0)
    if destination.prefixlen:
        body += nlattr.attr(RTA_DST, destination.network_address.packed)
    body += nlattr.attr(RTA_OIF, struct.pack("=I", _index(name)))
    _change(RTM_NEWROUTE, netlink.NLM_F_CREATE, body, f"routing {destination} to {name}")


def reachable(family: Family) -> tuple[Network, ...]:
    """What this namespace has a route to, its own addresses included and loopback not; just 0/0 (::/0) with a default route."""
    found: dict[Network, None] = {}
    header = ROUTE.pack(FAMILY_NUMBER[family], 0, 0, 0, 0, 0, 0, 0, 0)
    for payload in netlink.dump(netlink.NETLINK_ROUTE, RTM_GETROUTE, header):
        length, kind = payload[1], payload[7]
        network = _network(family, nlattr.parse_attrs(payload[ROUTE.size :]).get(RTA_DST), length)
        if kind not in (RTN_UNICAST, RTN_LOCAL) or network.is_loopback or network.is_link_local:
            continue
        if length == 0 and kind == RTN_UNICAST:
            return (network,)
        found[network] = None
    return tuple(found)


def _network(family: Family, destination: bytes | None, length: int) -> Network:
    address: Address
    if family is Family.V4:
        address = ipaddress.IPv4Address(destination or bytes(4))
    else:
        address = ipaddress.IPv6Address(destination or bytes(16))
    return ipaddress.ip_network((address, length), strict=False)


def _end(end: End) -> bytes:
    namespace = b"" if end.namespace is None else nlattr.attr(IFLA_NET_NS_FD, struct.pack("=I", end.namespace))
    return nlattr.attr(IFLA_IFNAME, end.name.encode() + b"\0") + namespace


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise BackendError(f"no interface {name} in this network namespace") from error


def _change(kind: int, flags: int, body: bytes, doing: str) -> None:
    try:
        netlink.request(netlink.NETLINK_ROUTE, [netlink.Message(kind, body, flags)])
    except OSError as error:
        raise BackendError(f"{doing}: {error.strerror}") from error
