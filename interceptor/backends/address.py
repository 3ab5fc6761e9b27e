"""::6/128 on lo, the source address of the proxy's inbound leg. Knows nothing of rules or of who needs it.

A ::6 that somebody else put there is used and never removed; ours is told by its noprefixroute flag, which `ip addr add`
does not set. Messages: linux/rtnetlink.h, linux/if_addr.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import Literal

from interceptor import nlattr
from interceptor.backends import netlink
from interceptor.errors import BackendError

INBOUND_SOURCE = ipaddress.IPv6Address("::6")
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_NODAD = 0x02
IFA_F_NOPREFIXROUTE = 0x200
LOOPBACK_IFINDEX = 1  # net/net_namespace.h: the same in every network namespace
_HEADER = struct.Struct("=BBBBI")  # struct ifaddrmsg


def add_inbound_source() -> None:
    """Add the address; nothing to do when there is one. Raises BackendError."""
    flags = struct.pack("=I", IFA_F_NODAD | IFA_F_NOPREFIXROUTE)
    message = netlink.Message(
        RTM_NEWADDR, _about_address() + nlattr.attr(IFA_FLAGS, flags), netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    )
    try:
        netlink.request(netlink.NETLINK_ROUTE, [message])
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise BackendError(f"adding {INBOUND_SOURCE}/128 to lo: {error.strerror}") from error


def remove_inbound_source() -> bool:
    """Remove the address if it is ours; whether it was. Raises BackendError."""
    if inbound_source_state() != "ours":
        return False
    try:
        netlink.request(netlink.NETLINK_ROUTE, [netlink.Message(RTM_DELADDR, _about_address())])
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise BackendError(f"removing {INBOUND_SOURCE}/128 from lo: {error.strerror}") from error
        return False
    return True


def inbound_source_state() -> Literal["ours", "foreign", "absent"]:
    """Whether lo has the address, and by whom. Raises BackendError."""
    try:
        answers = netlink.dump(netlink.NETLINK_ROUTE, RTM_GETADDR, _HEADER.pack(socket.AF_INET6, 0, 0, 0, LOOPBACK_IFINDEX))
    except OSError as error:
        if error.errno in netlink.SHORT_OF:
            raise BackendError(f"listing the addresses of lo: {error.strerror}") from error
        return "absent"  # a kernel without IPv6
    for answer in answers:
        family, _, short_flags, _, index = _HEADER.unpack_from(answer)
        attributes = nlattr.parse_attrs(answer[_HEADER.size :])
        if (family, index, attributes.get(IFA_ADDRESS)) == (socket.AF_INET6, LOOPBACK_IFINDEX, INBOUND_SOURCE.packed):
            (flags,) = struct.unpack("=I", attributes.get(IFA_FLAGS, struct.pack("=I", short_flags)))
            return "ours" if flags & IFA_F_NOPREFIXROUTE else "foreign"
    return "absent"


def _about_address() -> bytes:
    header = _HEADER.pack(socket.AF_INET6, 128, 0, 0, LOOPBACK_IFINDEX)
    return header + nlattr.attr(IFA_LOCAL, INBOUND_SOURCE.packed) + nlattr.attr(IFA_ADDRESS, INBOUND_SOURCE.packed)
