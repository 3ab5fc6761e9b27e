"""Send UDP datagrams from an address and port that another program has bound. Needs CAP_NET_RAW to open, nothing to send.

The UDP header is ours (RFC 768), the IP header the kernel's.
"""

from __future__ import annotations

import socket
import struct

from interceptor.sockets import Address, source_address

HEADER = struct.Struct("!HHHH")  # source port, destination port, length, checksum
IPV6_CHECKSUM = 7  # linux/in6.h; RFC 3542 3.1: the kernel computes the checksum and puts it at this offset
CHECKSUM_OFFSET = 6
SMALLEST_BUFFER = 1  # the kernel makes it 2 KiB or so (socket(7), SO_RCVBUF)


def open_raw(family: socket.AddressFamily) -> socket.socket:
    """A raw socket for reply(), in the network namespace of the calling thread. Raises PermissionError."""
    sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP)
    sock.setblocking(False)
    # It is given a copy of all UDP that arrives here, and nobody reads them.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALLEST_BUFFER)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_CHECKSUM, CHECKSUM_OFFSET)
    return sock


def reply(sock: socket.socket, datagram: bytes, source: Address, to: Address) -> int:
    """Send `datagram` from `source` to `to`; its length. Raises OSError, also for one that is too long."""
    # No checksum (zero) is allowed over IPv4; over IPv6 the kernel puts the right one in.
    header = HEADER.pack(source.port, to.port, HEADER.size + len(datagram), 0)
    # A raw socket's address has no port.
    peer = Address(to.ip, 0, to.scope).sockaddr
    return sock.sendmsg([header, datagram], source_address(source), 0, peer) - HEADER.size
