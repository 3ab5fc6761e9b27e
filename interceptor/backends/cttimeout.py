"""The conntrack timeout policies that iptables rules name (`CT --timeout itc4`). Which rules do is not known here.

Ours by their names. Messages: linux/netfilter/nfnetlink_cttimeout.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from typing import TypeAlias

from interceptor import nlattr
from interceptor.backends import netlink
from interceptor.errors import BackendError, Unsupported
from interceptor.plan.model import TIMEOUTS, TimeoutPolicy, timeout_name
from interceptor.values import Family

Policy: TypeAlias = tuple[TimeoutPolicy, Family]

NFNL_SUBSYS_CTNETLINK = 1  # linux/netfilter/nfnetlink.h
NFNL_SUBSYS_CTNETLINK_TIMEOUT = 8
IPCTNL_MSG_CT_GET_STATS_CPU = 4  # linux/netfilter/nfnetlink_conntrack.h
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


def ensure(policies: Iterable[Policy]) -> None:
    """Create each of `policies`, or set its values right. Raises Unsupported, BackendError."""
    wanted = tuple(policies)
    if not wanted:
        return
    right = present()
    for policy in wanted:
        if policy not in right:
            _create(policy)


def remove(policies: Iterable[Policy]) -> bool:
    """Delete `policies`; whether there were any. One that rules still name stays, where the kernel sees to that."""
    existing = _existing()
    deleted = [_delete(policy) for policy in policies if policy in existing]
    return any(deleted)


def every() -> tuple[Policy, ...]:
    """All policies that can be ours."""
    return tuple((policy, family) for policy in TimeoutPolicy for family in Family)


def existing() -> tuple[Policy, ...]:
    """The policies of ours that exist, with whatever values."""
    return tuple(_existing())


def present() -> tuple[Policy, ...]:
    """The policies that exist with the right values."""
    return tuple(policy for policy, is_right in _existing().items() if is_right)


def _existing() -> dict[Policy, bool]:
    """The policies that exist, and whether their values are right."""
    try:
        answers = netlink.dump(netlink.NETLINK_NETFILTER, _kind(IPCTNL_MSG_TIMEOUT_GET), _HEADER)
    except OSError as error:
        if error.errno in _NOT_IN_KERNEL:
            return {}
        raise BackendError(f"listing conntrack timeout policies: {error.strerror}") from error
    by_name = {_name(policy): policy for policy in every()}
    found: dict[Policy, bool] = {}
    for answer in answers:
        attributes = nlattr.parse_attrs(answer[len(_HEADER) :])
        policy = by_name.get(attributes.get(CTA_TIMEOUT_NAME, b""))
        if policy is not None:
            found[policy] = _is_right(policy, attributes)
    return found


def _is_right(policy: Policy, attributes: dict[int, bytes]) -> bool:
    values = nlattr.parse_attrs(attributes.get(CTA_TIMEOUT_DATA, b""))
    protocols = (attributes.get(CTA_TIMEOUT_L3PROTO), attributes.get(CTA_TIMEOUT_L4PROTO))
    seconds_right = all(
        values.get(CTA_TIMEOUT_TCP[state]) == _seconds(seconds) for state, seconds in TIMEOUTS[policy[0]].items()
    )
    return protocols == (_l3(policy[1]), _l4()) and seconds_right


def _create(policy: Policy) -> None:
    values = (nlattr.attr(CTA_TIMEOUT_TCP[state], _seconds(seconds)) for state, seconds in TIMEOUTS[policy[0]].items())
    attributes = (
        nlattr.attr(CTA_TIMEOUT_NAME, _name(policy)),
        nlattr.attr(CTA_TIMEOUT_L3PROTO, _l3(policy[1])),
        nlattr.attr(CTA_TIMEOUT_L4PROTO, _l4()),
        nlattr.nested(CTA_TIMEOUT_DATA, *values),
    )
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
    message = netlink.Message(_kind(IPCTNL_MSG_TIMEOUT_NEW), _HEADER + b"".join(attributes), flags)
    try:
        netlink.request(netlink.NETLINK_NETFILTER, [message])
    except OSError as error:
        if error.errno in _NOT_IN_KERNEL:
            from interceptor.backends import hints  # for those who fail

            missing = hints.CT_TIMEOUT if _has_conntrack() else hints.CONNTRACK
            raise Unsupported(f"creating conntrack timeout policies for iptables: {hints.lacks([missing])}") from error
        raise BackendError(f"creating conntrack timeout policy {timeout_name(*policy)}: {error.strerror}") from error


def _has_conntrack() -> bool:
    """Whether connections are tracked at all. Policies were refused: the kernel has tried its modules."""
    try:
        netlink.dump(netlink.NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET_STATS_CPU, _HEADER)
    except OSError:
        return False
    return True


def _delete(policy: Policy) -> bool:
    message = netlink.Message(_kind(IPCTNL_MSG_TIMEOUT_DELETE), _HEADER + nlattr.attr(CTA_TIMEOUT_NAME, _name(policy)))
    try:
        netlink.request(netlink.NETLINK_NETFILTER, [message])
    except OSError as error:
        # Busy: rules of ours in the other iptables variant still name it; their removal takes it along.
        if error.errno in (errno.EBUSY, errno.ENOENT):
            return False
        raise BackendError(f"deleting conntrack timeout policy {timeout_name(*policy)}: {error.strerror}") from error
    return True


def _kind(message: int) -> int:
    return NFNL_SUBSYS_CTNETLINK_TIMEOUT << 8 | message


def _name(policy: Policy) -> bytes:
    return timeout_name(*policy).encode() + b"\0"


def _l3(family: Family) -> bytes:
    return struct.pack("!H", ADDRESS_FAMILIES[family])


def _l4() -> bytes:
    return bytes([socket.IPPROTO_TCP])


def _seconds(seconds: int) -> bytes:
    return struct.pack("!I", seconds)
