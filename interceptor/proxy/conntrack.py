"""Have conntrack forget connections: ctnetlink, delete only. Knows nothing of flows.

Whoever takes packets away before netfilter sees them leaves an entry that would wait five days for the connection's end.
"""

from __future__ import annotations

import functools
import socket
import struct
from collections.abc import Iterable
from typing import TypeAlias

NETLINK_NETFILTER = 12  # linux/netlink.h
NLM_F_REQUEST = 1
NLA_F_NESTED = 1 << 15
IPCTNL_MSG_CT_DELETE = 0x0102  # NFNL_SUBSYS_CTNETLINK << 8 | 2, linux/netfilter/nfnetlink_conntrack.h
CTA_TUPLE_ORIG, CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 1, 2
CTA_IP = {4: (1, 2), 16: (3, 4)}  # source and destination, by the size of an address
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
HEADER = struct.Struct("=IHHIIBBH")  # struct nlmsghdr, struct nfgenmsg
BATCH_BYTES = 16384
# Packed source and destination address, source and destination port: as a packet has them.
Connection: TypeAlias = tuple[bytes, bytes, bytes, bytes]


class Conntrack:
    """A ctnetlink socket of the network namespace it was opened in. Needs CAP_NET_ADMIN."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._sock.setblocking(False)

    def forget(self, connections: Iterable[Connection]) -> None:
        """Delete TCP entries by their original tuple. One that is not there is no error."""
        batch = bytearray()
        for connection in connections:
            batch += _delete(connection)
            if len(batch) > BATCH_BYTES:
                self._send(batch)
                batch.clear()
        if batch:
            self._send(batch)

    def close(self) -> None:
        """Give the socket back."""
        self._sock.close()

    def _send(self, batch: bytearray) -> None:
        # The kernel works the whole batch off within send(), and reports failures (ENOENT alone, for a valid request)
        # to be read: which is not worth a syscall for each. They are dropped when the receive buffer is full.
        self._sock.send(batch)
        try:
            while self._sock.recv(BATCH_BYTES):
                pass
        except BlockingIOError:
            pass
        except OSError:
            pass  # ENOBUFS: answers were dropped


def _delete(connection: Connection) -> bytes:
    source, destination, source_port, destination_port = connection
    first, second, third, fourth = _parts(len(source))
    return b"".join((first, source, second, destination, third, source_port, fourth, destination_port, b"\0\0"))


@functools.cache
def _parts(size: int) -> tuple[bytes, bytes, bytes, bytes]:
    """What stands before each of the four variable pieces of a message; all but those pieces is constant for a family."""
    source, destination = CTA_IP[size]
    port = _attribute(CTA_PROTO_SRC_PORT, 2)
    protocol = _attribute(CTA_PROTO_NUM, 1) + bytes([socket.IPPROTO_TCP, 0, 0, 0])
    addresses = 2 * (4 + size)
    ports = len(protocol) + 2 * 8
    tuples = (4 + addresses) + (4 + ports)
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    header = HEADER.pack(HEADER.size + 4 + tuples, IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST, 0, 0, family, 0, 0)
    nested = _attribute(CTA_TUPLE_ORIG | NLA_F_NESTED, tuples) + _attribute(CTA_TUPLE_IP | NLA_F_NESTED, addresses)
    return (
        header + nested + _attribute(source, size),
        _attribute(destination, size),
        _attribute(CTA_TUPLE_PROTO | NLA_F_NESTED, ports) + protocol + port,
        b"\0\0" + _attribute(CTA_PROTO_DST_PORT, 2),
    )


def _attribute(kind: int, size: int) -> bytes:
    """The header of an attribute with so many bytes behind it."""
    return struct.pack("=HH", 4 + size, kind)
