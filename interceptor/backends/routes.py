"""TPROXY's policy routes: `ip rule` by mark into a table whose default route delivers everything locally.

Ours by the protocol number that both carry in the kernel. Reading is raw netlink; a change is pyroute2's, where there are
packages: the static CNI plugin has none, and sends the messages itself.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from interceptor import nlattr
from interceptor.backends import netlink
from interceptor.errors import BackendError, InterceptorError, Unsupported
from interceptor.plan.model import PolicyRoute
from interceptor.values import Family, Mark

if TYPE_CHECKING:
    from pyroute2 import IPRoute

    from interceptor.backends.route_messages import RouteMessages

# Neither the kernel's rtnetlink.h nor iproute2's rt_protos names 137.
PROTOCOL = 137
# Before the main table (32766), after local (0). Istio's own rules and Cilium's (9, 100) keep their places.
PRIORITY = 1337
# Of the route: a metric of its own, so that it never collides with another agent's route in the same table.
METRIC = 1337
RTM_GETROUTE = 26  # linux/rtnetlink.h, to the end of this block
RTM_GETRULE = 34
RTN_LOCAL = 2
RTA_TABLE = 15
FRA_PRIORITY = 6  # linux/fib_rules.h, to the end of this block
FRA_FWMARK = 10
FRA_TABLE = 15
FRA_FWMASK = 16
FRA_PROTOCOL = 21
LOOPBACK_IFINDEX = 1  # net/net_namespace.h
ADDRESS_FAMILIES = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
NO_MARK = Mark(0, 0)
NO_TABLE = 0  # RT_TABLE_UNSPEC
RULE = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr
ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg


@dataclass(frozen=True, slots=True)
class _Halves:
    """What the kernel holds of ours in one family: rules (mark, table), and tables with our route."""

    family: Family
    rules: tuple[tuple[Mark, int], ...]
    tables: tuple[int, ...]


def present() -> tuple[PolicyRoute, ...]:
    """What is ours now. Half of one, left by a crash, stands as a route without a mark, or into table 0."""
    return tuple(route for family in Family for route in _paired(_halves(family)))


def ensure(routes: Sequence[PolicyRoute]) -> None:
    """Make `routes` exist, and nothing else of ours. Raises BackendError; what was done by then stays."""
    halves = [_halves(family) for family in Family]
    missing_rules, missing_tables = [], []
    stale_rules, stale_tables = [], []
    for held in halves:
        wanted = [
            route for route in routes if route.family is held.family and route.mark != NO_MARK and route.table != NO_TABLE
        ]
        rules, tables = [(route.mark, route.table) for route in wanted], [route.table for route in wanted]
        missing_rules += [(held.family, *rule) for rule in dict.fromkeys(rules) if rule not in held.rules]
        missing_tables += [(held.family, table) for table in dict.fromkeys(tables) if table not in held.tables]
        stale_rules += [(held.family, *rule) for rule in held.rules if rule not in rules]
        stale_tables += [(held.family, table) for table in held.tables if table not in tables]
    if not (missing_rules or missing_tables or stale_rules or stale_tables):
        return
    with _opened() as ip:
        # A rule never stands without its route: packets it selects would go on to the main table, uncaptured.
        for family, table in missing_tables:
            _change_route(ip, "add", family, table)
        for family, mark, table in missing_rules:
            _change_rule(ip, "add", family, mark, table)
        for family, mark, table in stale_rules:
            _change_rule(ip, "del", family, mark, table)
        for family, table in stale_tables:
            _change_route(ip, "del", family, table)


def _paired(held: _Halves) -> Iterator[PolicyRoute]:
    for mark, table in held.rules:
        yield PolicyRoute(held.family, mark, table if table in held.tables else NO_TABLE)
    led_to = {table for _, table in held.rules}
    for table in held.tables:
        if table not in led_to:
            yield PolicyRoute(held.family, NO_MARK, table)


def _halves(family: Family) -> _Halves:
    address_family = ADDRESS_FAMILIES[family]
    rules = dump(RTM_GETRULE, RULE.pack(address_family, 0, 0, 0, 0, 0, 0, 0, 0))
    routes = dump(RTM_GETROUTE, ROUTE.pack(address_family, 0, 0, 0, 0, PROTOCOL, 0, 0, 0))
    return _ours(family, tuple(rules), tuple(routes))


# Asked several times a run; and in most namespaces nothing but the kernel's own rules stands.
@lru_cache(32)
def _ours(family: Family, listed_rules: tuple[bytes, ...], listed_routes: tuple[bytes, ...]) -> _Halves:
    address_family = ADDRESS_FAMILIES[family]
    rules: list[tuple[Mark, int]] = []
    for answer in listed_rules:
        header, attributes = RULE.unpack_from(answer), nlattr.parse_attrs(answer[RULE.size :])
        ours = attributes.get(FRA_PROTOCOL) == bytes([PROTOCOL]) and u32(attributes.get(FRA_PRIORITY), 0) == PRIORITY
        if header[0] == address_family and ours:
            mark = Mark(u32(attributes.get(FRA_FWMARK), 0), u32(attributes.get(FRA_FWMASK), 0))
            rules.append((mark, u32(attributes.get(FRA_TABLE), header[4])))
    tables: list[int] = []
    for answer in listed_routes:
        header, attributes = ROUTE.unpack_from(answer), nlattr.parse_attrs(answer[ROUTE.size :])
        length_of_dst = header[1]
        if (header[0], length_of_dst, header[5], header[7]) == (address_family, 0, PROTOCOL, RTN_LOCAL):
            tables.append(u32(attributes.get(RTA_TABLE), header[4]))
    return _Halves(family, tuple(rules), tuple(tables))


def dump(kind: int, payload: bytes) -> list[bytes]:
    """Answers to RTM_GETRULE or RTM_GETROUTE; none from a kernel without such. Raises BackendError."""
    try:
        return netlink.dump(netlink.NETLINK_ROUTE, kind, payload)
    except OSError as error:
        # A kernel without IPv6, or without policy routing; a table that does not exist.
        if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
            return []
        raise BackendError(f"listing ip rules and routes: {error.strerror or error}") from error


def u32(payload: bytes | None, otherwise: int) -> int:
    """A number of an attribute; `otherwise` when there is none."""
    return int.from_bytes(payload, "little" if struct.pack("=H", 1) == b"\x01\x00" else "big") if payload else otherwise


def _opened() -> IPRoute | RouteMessages:
    """What changes are made by. Raises BackendError."""
    netlink.forget()
    try:
        from pyroute2 import IPRoute  # 180–250 ms: only when there is something to change
    except ModuleNotFoundError:
        from interceptor.backends.route_messages import RouteMessages

        return RouteMessages()
    try:
        return IPRoute()
    except OSError as error:
        raise BackendError(f"changing ip rules and routes: {error.strerror or error}") from error


def _refusal() -> type[Exception]:
    # What _opened()'s answer raises; in both the first argument is the kernel's errno.
    try:
        from pyroute2 import NetlinkError
    except ModuleNotFoundError:
        return OSError
    refusal: type[Exception] = NetlinkError
    return refusal


def _change_rule(ip: IPRoute | RouteMessages, verb: str, family: Family, mark: Mark, table: int) -> None:
    try:
        ip.rule(
            verb,
            family=ADDRESS_FAMILIES[family],
            priority=PRIORITY,
            fwmark=mark.value,
            fwmask=mark.mask,
            table=table,
            protocol=PROTOCOL,
        )
    except _refusal() as error:
        what = f"IP{family.value} rule priority {PRIORITY} fwmark {mark} lookup {table}"
        raise _failed(verb, what, error.args[0]) from error


def _change_route(ip: IPRoute | RouteMessages, verb: str, family: Family, table: int) -> None:
    try:
        ip.route(
            verb,
            family=ADDRESS_FAMILIES[family],
            type="local",
            dst="default",
            oif=LOOPBACK_IFINDEX,
            table=table,
            proto=PROTOCOL,
            priority=METRIC,
            scope="host",
        )
    except _refusal() as error:
        raise _failed(verb, f"IP{family.value} route local default dev lo table {table}", error.args[0]) from error


def _failed(verb: str, what: str, code: int) -> InterceptorError:
    action = "adding" if verb == "add" else "deleting"
    if code == errno.EACCES:  # not EPERM, which is what a missing capability gets
        return Unsupported(
            f"{action} {what}: IPv6 is off on lo, where TPROXY delivers: "
            "set net.ipv6.conf.lo.disable_ipv6=0, or give --ip-family v4"
        )
    hints = {
        errno.EEXIST: " with another owner; see `ip rule` and `ip route show table all`",
        errno.ENETDOWN: "; `ip link set lo up` first",
    }
    return BackendError(f"{action} {what}: {errno.errorcode.get(code, code)}{hints.get(code, '')}")
