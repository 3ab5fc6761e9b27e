"""Socket options under their kernel header names, typed get and set, and socket addresses as values.

Works on sockets that others opened; knows nothing of rules, flows or the proxy.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Ancillary: TypeAlias = tuple[int, int, bytes]
# What the socket module takes and gives for an internet address. In normal form (`normal`), a v4-mapped IPv6 address is the
# IPv4 address it stands for: then the length tells the family. For where an Address would cost too much: once a connection.
SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

SO_MARK = 36  # asm-generic/socket.h
SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h
IP6T_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv6/ip6_tables.h
# linux/in.h
IP_PKTINFO = 8
IP_RECVERR = 11
IP_FREEBIND = 15
IP_TRANSPARENT = 19
IP_RECVORIGDSTADDR = 20
IP_BIND_ADDRESS_NO_PORT = 24
# linux/in6.h
IPV6_RECVERR = 25
IPV6_RECVPKTINFO = 49
IPV6_PKTINFO = 50
IPV6_RECVORIGDSTADDR = 74
IPV6_TRANSPARENT = 75
IPV6_FREEBIND = 78

SIOCOUTQ = 0x5411  # linux/sockios.h: bytes written and not yet acknowledged by the peer

V4_MAPPED = "::ffff:"  # RFC 4291 2.5.5.2

TCP_CLOSE = 7  # net/tcp_states.h
TCPI_UNACKED, TCPI_SACKED = slice(24, 28), slice(28, 32)  # of struct tcp_info, linux/tcp.h

SOCKADDR_IN_SIZE = 16  # struct sockaddr_in, linux/in.h
SOCKADDR_IN6_SIZE = 28  # struct sockaddr_in6, linux/in6.h
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, zero seconds: close() sends RST (socket(7))


@dataclass(frozen=True, slots=True)
class Address:
    """One end of a connection. A v4-mapped IPv6 address is held as the IPv4 address it stands for."""

    ip: IpAddress
    port: int
    scope: int = 0  # interface index, for link-local IPv6

    def __str__(self) -> str:
        if self.ip.version == 4:
            return f"{self.ip}:{self.port}"
        return f"[{self.ip}%{self.scope}]:{self.port}" if self.scope else f"[{self.ip}]:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """The family of a socket that can talk to this address natively."""
        return socket.AF_INET if self.ip.version == 4 else socket.AF_INET6

    @property
    def sockaddr(self) -> SockAddr:
        """What `socket.bind` and `socket.connect` take, for a socket of `family`."""
        return (str(self.ip), self.port) if self.ip.version == 4 else (str(self.ip), self.port, 0, self.scope)


def unmapped(ip: IpAddress) -> IpAddress:
    """`ip`, or the IPv4 address inside it when it is v4-mapped (::ffff:a.b.c.d, RFC 4291 2.5.5.2)."""
    return (ip.ipv4_mapped or ip) if ip.version == 6 else ip


def address(sockaddr: SockAddr) -> Address:
    """The value of what `getsockname`, `getpeername`, `accept` and `recvmsg` return for an internet socket."""
    host, _, _ = sockaddr[0].partition("%")
    return Address(unmapped(ipaddress.ip_address(host)), sockaddr[1], sockaddr[3] if len(sockaddr) == 4 else 0)


def normal(sockaddr: SockAddr) -> SockAddr:
    """`sockaddr` in normal form: what `address` does, without leaving the socket module's own words.

    Equal addresses are one string: thousands of waiting connections have few.
    """
    if len(sockaddr) == 2:
        return (sys.intern(sockaddr[0]), sockaddr[1])
    if sockaddr[0].startswith(V4_MAPPED) and "." in sockaddr[0]:
        return (sys.intern(sockaddr[0][len(V4_MAPPED) :]), sockaddr[1])
    return (sys.intern(sockaddr[0]), *sockaddr[1:])


def sockaddr_text(sockaddr: SockAddr) -> str:
    """As str(address(sockaddr)), for the normal form."""
    if len(sockaddr) == 2:
        return f"{sockaddr[0]}:{sockaddr[1]}"
    return f"[{sockaddr[0]}%{sockaddr[3]}]:{sockaddr[1]}" if sockaddr[3] else f"[{sockaddr[0]}]:{sockaddr[1]}"


def sockaddr_from_raw(raw: bytes) -> SockAddr:
    """A kernel `struct sockaddr_in` or `sockaddr_in6` in normal form, as SO_ORIGINAL_DST gives it."""
    port = raw[2] << 8 | raw[3]
    if len(raw) == SOCKADDR_IN_SIZE:
        return (socket.inet_ntoa(raw[4:8]), port)
    scope = int.from_bytes(raw[24:28], sys.byteorder)
    return normal((socket.inet_ntop(socket.AF_INET6, raw[8:24]), port, 0, scope))


def accept(listener: socket.SocketType, family: int) -> tuple[socket.SocketType, SockAddr]:
    """As socket.accept() on a stream listener of `family`, at a third of its cost, and non-blocking.

    Raises OSError as accept(2) does, BlockingIOError when nobody waits (see `waiting`).
    """
    descriptor, peer = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - what socket.accept() itself calls
    sock = socket.SocketType(family, socket.SOCK_STREAM, 0, descriptor)
    sock.setblocking(False)
    return sock, peer


def waiting(listener: socket.socket) -> int | None:
    """How many connections `accept` can take off a TCP listener now; None where the kernel does not say (gVisor's).

    An accept(2) in vain makes a socket and a file before it finds that nobody waits: six times the cost of asking.
    """
    # Of a listener, tcpi_unacked is the length of that queue, and tcpi_sacked the longest it may be (tcp_get_info,
    # net/ipv4/tcp.c).
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCPI_SACKED.stop)
    count = int.from_bytes(info[TCPI_UNACKED], sys.byteorder)
    return count if count or any(info[TCPI_SACKED]) else None


def decode_sockaddr(raw: bytes) -> Address:
    """A kernel `struct sockaddr_in` or `sockaddr_in6` as a value.

    Raises ValueError when it is neither, or shorter than its family demands.
    """
    if len(raw) < 2:
        raise ValueError(f"a socket address of {len(raw)} bytes")
    (family,) = struct.unpack_from("=H", raw)
    if family == socket.AF_INET and len(raw) >= 8:
        port, packed = struct.unpack_from("!H4s", raw, 2)
        return Address(ipaddress.IPv4Address(packed), port)
    if family == socket.AF_INET6 and len(raw) >= SOCKADDR_IN6_SIZE:
        port, _flow, packed = struct.unpack_from("!HI16s", raw, 2)
        (scope,) = struct.unpack_from("=I", raw, 24)
        return Address(unmapped(ipaddress.IPv6Address(packed)), port, scope)
    raise ValueError(f"a socket address of family {family} and {len(raw)} bytes")


def original_dst_v4(sock: socket.SocketType) -> SockAddr:
    """Where an IPv4 (or v4-mapped) connection was going before REDIRECT. Raises OSError as getsockopt does."""
    return sockaddr_from_raw(sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, SOCKADDR_IN_SIZE))


def original_dst_v6(sock: socket.SocketType) -> SockAddr:
    """Where an IPv6 connection was going before REDIRECT. Raises OSError as getsockopt does."""
    return sockaddr_from_raw(sock.getsockopt(socket.IPPROTO_IPV6, IP6T_SO_ORIGINAL_DST, SOCKADDR_IN6_SIZE))


def set_transparent(sock: socket.SocketType) -> None:
    """Let `sock` bind and speak from addresses that are not this host's. Raises PermissionError without CAP_NET_ADMIN."""
    _set_for_family(sock, IP_TRANSPARENT, IPV6_TRANSPARENT)


def set_freebind(sock: socket.SocketType) -> None:
    """Let `sock` bind an address that no interface has (yet)."""
    _set_for_family(sock, IP_FREEBIND, IPV6_FREEBIND)


def set_late_port(sock: socket.SocketType) -> None:
    """Choose the source port at connect, not at bind: one port serves many destinations (ip(7)).

    The option is SOL_IP's for both families: inet_bind and inet6_bind read the same flag.
    """
    sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)


def set_mark(sock: socket.SocketType, mark: int) -> None:
    """Give every packet of `sock` the firewall mark `mark`. Raises PermissionError without CAP_NET_ADMIN."""
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))


def receive_original_dst(sock: socket.socket) -> None:
    """Have `recvmsg` on a TPROXY datagram socket tell each datagram's original destination."""
    _set_for_family(sock, IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR)


def receive_local_address(sock: socket.socket) -> None:
    """Have `recvmsg` on a datagram socket tell the local address each datagram arrived at."""
    _set_for_family(sock, IP_PKTINFO, IPV6_RECVPKTINFO)


def original_dst_of(ancillary: Iterable[Ancillary]) -> Address | None:
    """The original destination among a datagram's control messages; None when the kernel sent none."""
    for level, kind, content in ancillary:
        if (level, kind) in ((socket.SOL_IP, IP_RECVORIGDSTADDR), (socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR)):
            return decode_sockaddr(content)
    return None


def reply_from_same(ancillary: Iterable[Ancillary]) -> list[Ancillary]:
    """Control messages for `sendmsg` that answer from the address a datagram arrived at.

    in_pktinfo is {interface, address to send from, destination in the header}: on receipt the kernel fills both
    addresses, on sending it reads the middle one (ip(7)). in6_pktinfo is {address, interface} both ways.
    The interface is left to routing: an answer may leave by another one.
    """
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_IP, IP_PKTINFO):
            return [(level, kind, struct.pack("=I4s4s", 0, content[4:8], bytes(4)))]
        if (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            return [(level, kind, content[:16] + bytes(4))]
    return []


def arrival_interface(ancillary: Iterable[Ancillary]) -> int:
    """The index of the interface a datagram came in by; 0 when the kernel did not say (`receive_local_address`)."""
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_IP, IP_PKTINFO):
            return int(struct.unpack_from("=i", content)[0])
        if (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            return int(struct.unpack_from("=i", content, 16)[0])
    return 0


def source_address(source: Address) -> list[Ancillary]:
    """Control messages for `sendmsg` that send from this local address (ip(7) IP_PKTINFO, RFC 3542 6)."""
    if source.ip.version == 4:
        return [(socket.SOL_IP, IP_PKTINFO, struct.pack("=I4s4s", 0, source.ip.packed, bytes(4)))]
    return [(socket.IPPROTO_IPV6, IPV6_PKTINFO, source.ip.packed + struct.pack("=I", source.scope))]


def receive_errors(sock: socket.SocketType) -> None:
    """Have a datagram socket that is not connected told of ICMP errors, as a connected one is (ip(7) IP_RECVERR)."""
    _set_for_family(sock, IP_RECVERR, IPV6_RECVERR)


def forget_errors(sock: socket.SocketType) -> None:
    """Throw away the errors that `receive_errors` has queued: the socket counts as ready while there is one."""
    with suppress(BlockingIOError):
        while True:
            sock.recvmsg(1, 0, socket.MSG_ERRQUEUE)


def reset_on_close(sock: socket.SocketType) -> None:
    """Make the coming close() send RST, not FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def pending_error(sock: socket.SocketType) -> int:
    """SO_ERROR, which reading clears: remember what this returns."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def unacknowledged(sock: socket.SocketType) -> int:
    """How many bytes written to `sock` its peer may still acknowledge; 0 for a connection that is dead."""
    # The state is the first byte of struct tcp_info. A dead connection keeps its counters: SIOCOUTQ alone would never be 0.
    if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
        return 0
    return int(struct.unpack("=i", fcntl.ioctl(sock, SIOCOUTQ, bytes(4)))[0])


def _set_for_family(sock: socket.SocketType, v4_option: int, v6_option: int) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, v6_option, 1)
    else:
        sock.setsockopt(socket.SOL_IP, v4_option, 1)
