"""Two questions to the kernel over netlink: whose socket is this, and is this address ours. Knows nothing of flows.

pyroute2 answers them too, for 180-250 ms at import and some 20 times the cost a question.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import NamedTuple

from interceptor.sockets import Address, IpAddress, SockAddr

NETLINK_SOCK_DIAG = 4  # linux/netlink.h
NLM_F_REQUEST = 1
NLMSG_ERROR = 2
SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
INET_DIAG_NOCOOKIE = 0xFFFFFFFF  # linux/inet_diag.h
ALL_STATES = 0xFFFFFFFF
RTM_GETROUTE = 26  # linux/rtnetlink.h
RTA_DST = 1
RTN_LOCAL = 2

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
SOCKET_REQUEST = struct.Struct("=BBBBI2s2s16s16sIII")  # struct inet_diag_req_v2
SOCKET_ANSWER = struct.Struct("=BBBB2s2s16s16sIIIIIIII")  # struct inet_diag_msg; the last two are uid and inode
# nlmsghdr and inet_diag_req_v2 in one; where uid and inode are in an answer.
CONNECTION_REQUEST = struct.Struct("=IHHIIBBBBIHH16s16sIII")
UID_AND_INODE = struct.Struct("=II")
UID_OFFSET = HEADER.size + SOCKET_ANSWER.size - UID_AND_INODE.size
SOCK_DIAG_REPLY = SOCK_DIAG_BY_FAMILY.to_bytes(2, sys.byteorder)
ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg; the eighth is the type of the route
# linux/rtnetlink.h: RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE
ADDRESSES_AND_ROUTES = 0x10 | 0x40 | 0x100 | 0x400
REPLY_SIZE = 8192  # what the kernel itself fills at most for one message (NLMSG_GOODSIZE)


class SocketOwner(NamedTuple):
    """Who opened a socket. The inode is 0 while nobody has accepted it."""

    uid: int
    inode: int


class Netlink:
    """Netlink sockets of the network namespace they were opened in; they stay there whatever the thread does later."""

    def __init__(self) -> None:
        self._diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        self._route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    def close(self) -> None:
        """Give the sockets back."""
        self._diag.close()
        self._route.close()

    def owner(self, protocol: int, local: Address, remote: Address) -> SocketOwner | None:
        """Who owns the socket with these two ends; None when there is none.

        As the kernel's own lookup does, a listener on `local` is found when no connection matches.
        """
        # udp_dump_one() reads the two ends the other way round, "for historical reasons" (net/ipv4/udp_diag.c).
        near, far = (remote, local) if protocol == socket.IPPROTO_UDP else (local, remote)
        ports = (near.port.to_bytes(2, "big"), far.port.to_bytes(2, "big"))
        ends = (near.ip.packed.ljust(16, b"\0"), far.ip.packed.ljust(16, b"\0"))
        question = SOCKET_REQUEST.pack(
            local.family, protocol, 0, 0, ALL_STATES, *ports, *ends, 0, INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE
        )
        answer = _ask(self._diag, SOCK_DIAG_BY_FAMILY, question)
        if answer is None:
            return None
        *_, uid, inode = SOCKET_ANSWER.unpack_from(answer)
        return SocketOwner(uid, inode)

    def connection_owner(self, local: SockAddr, remote: SockAddr) -> SocketOwner | None:
        """As `owner` for TCP, at a third of its cost."""
        family = socket.AF_INET if len(local) == 2 else socket.AF_INET6
        question = CONNECTION_REQUEST.pack(
            CONNECTION_REQUEST.size,
            SOCK_DIAG_BY_FAMILY,
            NLM_F_REQUEST,
            0,
            0,
            family,
            socket.IPPROTO_TCP,
            0,
            0,
            ALL_STATES,
            socket.htons(local[1]),
            socket.htons(remote[1]),
            socket.inet_pton(family, local[0]),  # struct pads it with zeros
            socket.inet_pton(family, remote[0]),
            0,
            INET_DIAG_NOCOOKIE,
            INET_DIAG_NOCOOKIE,
        )
        self._diag.send(question)
        reply = self._diag.recv(REPLY_SIZE, socket.MSG_DONTWAIT)
        if reply[4:6] != SOCK_DIAG_REPLY:
            return None  # "no such socket", or out of memory: not known
        return SocketOwner(*UID_AND_INODE.unpack_from(reply, UID_OFFSET))

    def listener_owner(self, protocol: int, local: Address) -> SocketOwner | None:
        """Who listens on `local`; None when nobody does."""
        return self.owner(protocol, local, Address(type(local.ip)(0), 0))

    def is_local(self, ip: IpAddress) -> bool:
        """Whether `ip` is an address of this network namespace, loopback included."""
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        packed = ip.packed
        question = (
            ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0) + struct.pack("=HH", 4 + len(packed), RTA_DST) + packed
        )
        answer = _ask(self._route, RTM_GETROUTE, question)
        return answer is not None and ROUTE.unpack_from(answer)[7] == RTN_LOCAL


def listen_for_changes() -> socket.socket:
    """A socket that is readable when an address or a local route of this network namespace has come or gone."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock.setblocking(False)
    sock.bind((0, ADDRESSES_AND_ROUTES))
    return sock


def _ask(sock: socket.socket, kind: int, question: bytes) -> bytes | None:
    # The kernel answers within send(): by the time it returns, the reply is queued.
    sock.send(HEADER.pack(HEADER.size + len(question), kind, NLM_F_REQUEST, 0, 0) + question)
    reply = sock.recv(REPLY_SIZE, socket.MSG_DONTWAIT)
    if HEADER.unpack_from(reply)[1] != NLMSG_ERROR:
        return reply[HEADER.size :]
    number = -struct.unpack_from("=i", reply, HEADER.size)[0]
    # "No such socket" and "no route there" are answers.
    if number in (errno.ENOENT, errno.ENETUNREACH, errno.EHOSTUNREACH):
        return None
    raise OSError(number, os.strerror(number))
