"""The conntrack timeout policies that iptables rules name (`CT --timeout itc4`). Which rules do is not known here.

Ours by their names. Messages: linux/netfilter/nfnetlink_cttimeout.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from interceptor.backends import netlink
from interceptor.errors import BackendError, Unsupported
from interceptor.plan.model import CLOSED_AT_ONCE, TIMEOUT_NAMES
from interceptor.values import Family

NFNL_SUBSYS_CTNETLINK_TIMEOUT = 8
IPCTNL_MSG_TIMEOUT_NEW = 0
IPCTNL_MSG_TIMEOUT_GET = 1
IPCTNL_MSG_TIMEOUT_DELETE = 2
CTA_TIMEOUT_NAME = 1
CTA_TIMEOUT_L3PROTO = 2
CTA_TIMEOUT_L4PROTO = 3
CTA_TIMEOUT_DATA = 4
CTA_TIMEOUT_TCP = {"fin_wait": 4, "close": 8}  # CTA_TIMEOUT_TCP_FIN_WAIT, CTA_TIMEOUT_TCP_CLOSE
ADDRESS_FAMILIES = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
# nfnetlink knows no such subsystem (EINVAL), or no timeouts for TCP.
_NOT_IN_KERNEL = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)
_HEADER = struct.pack("=BBH", socket.AF_INET, 0, 0)  # struct nfgenmsg


def ensure(families: Iterable[Family]) -> None:
    """Create the policy of each of `families`, or set its values right. Raises Unsupported, BackendError."""
    wanted = tuple(families)
    if not wanted:
        return
    right = present()
    for family in wanted:
        if family not in right:
            _create(family)


def remove(families: Iterable[Family]) -> bool:
    """Delete the policies of `families`; whether there were any. One that rules still name stays."""
    existing = _existing()
    deleted = [_delete(family) for family in families if family in existing]
    return any(deleted)


def remove_all() -> bool:
    """Delete all policies of ours; whether there were any."""
    return remove(tuple(Family))


def present() -> tuple[Family, ...]:
    """The families whose policy exists with the right values."""
    return tuple(family for family, is_right in _existing().items() if is_right)


def _existing() -> dict[Family, bool]:
    """The families whose policy exists, and whether its values are right."""
    try:
        answers = netlink.dump(netlink.NETLINK_NETFILTER, _kind(IPCTNL_MSG_TIMEOUT_GET), _HEADER)
    except OSError as error:
        if error.errno in _NOT_IN_KERNEL:
            return {}
        raise BackendError(f"listing conntrack timeout policies: {error.strerror}") from error
    by_name = {_name(family): family for family in Family}
    found: dict[Family, bool] = {}
    for answer in answers:
        attributes = netlink.parse_attrs(answer[len(_HEADER) :])
        family = by_name.get(attributes.get(CTA_TIMEOUT_NAME, b""))
        if family is not None:
            found[family] = _is_right(family, attributes)
    return found


def _is_right(family: Family, attributes: dict[int, bytes]) -> bool:
    values = netlink.parse_attrs(attributes.get(CTA_TIMEOUT_DATA, b""))
    protocols = (attributes.get(CTA_TIMEOUT_L3PROTO), attributes.get(CTA_TIMEOUT_L4PROTO))
    seconds_right = all(values.get(CTA_TIMEOUT_TCP[state]) == _seconds(seconds) for state, seconds in CLOSED_AT_ONCE.items())
    return protocols == (_l3(family), _l4()) and seconds_right


def _create(family: Family) -> None:
    values = (netlink.attr(CTA_TIMEOUT_TCP[state], _seconds(seconds)) for state, seconds in CLOSED_AT_ONCE.items())
    policy = (
        netlink.attr(CTA_TIMEOUT_NAME, _name(family)),
        netlink.attr(CTA_TIMEOUT_L3PROTO, _l3(family)),
        netlink.attr(CTA_TIMEOUT_L4PROTO, _l4()),
        netlink.nested(CTA_TIMEOUT_DATA, *values),
    )
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
    message = netlink.Message(_kind(IPCTNL_MSG_TIMEOUT_NEW), _HEADER + b"".join(policy), flags)
    try:
        netlink.request(netlink.NETLINK_NETFILTER, [message])
    except OSError as error:
        if error.errno in _NOT_IN_KERNEL:
            raise Unsupported(
                "this kernel has no conntrack timeout policies for iptables (CONFIG_NF_CT_NETLINK_TIMEOUT, module "
                "nfnetlink_cttimeout): load or build it, or use --no-conntrack-timeouts, at a price"
            ) from error
        raise BackendError(f"creating conntrack timeout policy {TIMEOUT_NAMES[family]}: {error.strerror}") from error


def _delete(family: Family) -> bool:
    message = netlink.Message(_kind(IPCTNL_MSG_TIMEOUT_DELETE), _HEADER + netlink.attr(CTA_TIMEOUT_NAME, _name(family)))
    try:
        netlink.request(netlink.NETLINK_NETFILTER, [message])
    except OSError as error:
        # Busy: rules of ours in the other iptables variant still name it; their removal takes it along.
        if error.errno in (errno.EBUSY, errno.ENOENT):
            return False
        raise BackendError(f"deleting conntrack timeout policy {TIMEOUT_NAMES[family]}: {error.strerror}") from error
    return True


def _kind(message: int) -> int:
    return NFNL_SUBSYS_CTNETLINK_TIMEOUT << 8 | message


def _name(family: Family) -> bytes:
    return TIMEOUT_NAMES[family].encode() + b"\0"


def _l3(family: Family) -> bytes:
    return struct.pack("!H", ADDRESS_FAMILIES[family])


def _l4() -> bytes:
    return bytes([socket.IPPROTO_TCP])


def _seconds(seconds: int) -> bytes:
    return struct.pack("!I", seconds)
