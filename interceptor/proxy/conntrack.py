"""Have conntrack forget connections: ctnetlink, delete only. Knows nothing of flows.

Whoever takes packets away before netfilter sees them leaves an entry that would wait five days for the connection's end.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from interceptor.sockets import Address

NETLINK_NETFILTER = 12  # linux/netlink.h
NLM_F_REQUEST = 1
NLA_F_NESTED = 1 << 15
IPCTNL_MSG_CT_DELETE = 0x0102  # NFNL_SUBSYS_CTNETLINK << 8 | 2, linux/netfilter/nfnetlink_conntrack.h
CTA_TUPLE_ORIG, CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 1, 2
CTA_IP = {4: (1, 2), 6: (3, 4)}  # source, destination
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
HEADER = struct.Struct("=IHHIIBBH")  # struct nlmsghdr, struct nfgenmsg
BATCH_BYTES = 16384


class Conntrack:
    """A ctnetlink socket of the network namespace it was opened in. Needs CAP_NET_ADMIN."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._sock.setblocking(False)

    def forget(self, connections: Iterable[tuple[Address, Address]]) -> None:
        """Delete TCP entries by their original tuple, (source, destination). One that is not there is no error."""
        batch = bytearray()
        for source, destination in connections:
            batch += _delete(source, destination)
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


def _delete(source: Address, destination: Address) -> bytes:
    first, second = CTA_IP[source.ip.version]
    addresses = _attribute(first, source.ip.packed) + _attribute(second, destination.ip.packed)
    ports = (
        _attribute(CTA_PROTO_NUM, bytes([socket.IPPROTO_TCP]))
        + _attribute(CTA_PROTO_SRC_PORT, source.port.to_bytes(2, "big"))
        + _attribute(CTA_PROTO_DST_PORT, destination.port.to_bytes(2, "big"))
    )
    body = _attribute(
        CTA_TUPLE_ORIG | NLA_F_NESTED,
        _attribute(CTA_TUPLE_IP | NLA_F_NESTED, addresses) + _attribute(CTA_TUPLE_PROTO | NLA_F_NESTED, ports),
    )
    return HEADER.pack(HEADER.size + len(body), IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST, 0, 0, source.family, 0, 0) + body


def _attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)
