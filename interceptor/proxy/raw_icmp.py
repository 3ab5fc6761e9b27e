"""Tell a client by ICMP that its datagram did not get there, as the router or host would have told it without us.

Needs CAP_NET_RAW and CAP_NET_ADMIN to open, nothing to send. What is written here is ICMP's (RFC 792, RFC 4443); the IP
header of the message itself is the kernel's.
"""

from __future__ import annotations

import errno
import socket
import struct

from interceptor.sockets import Address, set_transparent, source_address

# errno of the upstream socket -> (type, code): nobody at that port, no such host, no route (RFC 792; RFC 4443 3.1).
UNREACHABLE_V4 = {errno.ECONNREFUSED: (3, 3), errno.EHOSTUNREACH: (3, 1), errno.ENETUNREACH: (3, 0)}
UNREACHABLE_V6 = {errno.ECONNREFUSED: (1, 4), errno.EHOSTUNREACH: (1, 3), errno.ENETUNREACH: (1, 0)}
_MESSAGE = struct.Struct("!BBHI")  # type, code, checksum, unused
_UDP = struct.Struct("!HHHH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")  # RFC 791 3.1
_IPV6 = struct.Struct("!IHBB16s16s")  # RFC 8200 3
SOL_RAW = 255  # linux/socket.h
SMALLEST_BUFFER = 1  # the kernel makes it 2 KiB or so (socket(7), SO_RCVBUF)
ICMP_FILTER = 1  # linux/icmp.h; and ICMPV6_FILTER, linux/icmpv6.h


def open_icmp(family: socket.AddressFamily) -> socket.socket:
    """A raw socket for tell_unreachable(), in the network namespace of the calling thread. Raises PermissionError."""
    is_v4 = family == socket.AF_INET
    sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMP if is_v4 else socket.IPPROTO_ICMPV6)
    try:
        sock.setblocking(False)
        # Nobody reads what arrives: so nothing does. A bit for each type that is not wanted.
        sock.setsockopt(SOL_RAW if is_v4 else socket.IPPROTO_ICMPV6, ICMP_FILTER, b"\xff" * (4 if is_v4 else 32))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALLEST_BUFFER)
        set_transparent(sock)  # the message comes from the destination, which is seldom ours
    except OSError:
        sock.close()
        raise
    return sock


def tell_unreachable(sock: socket.socket, client: Address, destination: Address, number: int) -> bool:
    """Tell `client` that `destination` cannot be reached for the reason `number`, an errno; False when ICMP has no word for it.

    Raises OSError when it can't be sent.
    """
    said = (UNREACHABLE_V4 if client.ip.version == 4 else UNREACHABLE_V6).get(number)
    if said is None:
        return False
    quoted = quote(client, destination)
    head = _MESSAGE.pack(*said, 0, 0)
    if client.ip.version == 4:  # over IPv6 the kernel puts the sum in (RFC 3542 3.1)
        head = _MESSAGE.pack(*said, checksum(head + quoted), 0)
    sock.sendmsg([head, quoted], source_address(destination), 0, Address(client.ip, 0, client.scope).sockaddr)
    return True


def quote(client: Address, destination: Address) -> bytes:
    """What an error quotes of a datagram from `client` to `destination`: the headers, by which a kernel finds the socket."""
    udp = _UDP.pack(client.port, destination.port, _UDP.size, 0)
    if client.ip.version == 6:
        return _IPV6.pack(6 << 28, _UDP.size, socket.IPPROTO_UDP, 64, client.ip.packed, destination.ip.packed) + udp
    size = _IPV4.size + _UDP.size
    parts = (0x45, 0, size, 0, 0, 64, socket.IPPROTO_UDP)
    head = _IPV4.pack(*parts, 0, client.ip.packed, destination.ip.packed)
    return _IPV4.pack(*parts, checksum(head), client.ip.packed, destination.ip.packed) + udp


def checksum(content: bytes) -> int:
    """The Internet checksum of an even number of bytes (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
