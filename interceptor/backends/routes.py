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
from typing import TYPE_CHECKING

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
RTN_NAMES = {1: "unicast", 6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
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
_RULE = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg


@dataclass(frozen=True, slots=True)
class _Halves:
    """What the kernel holds of ours in one family: rules (mark, table), and tables with our route."""

    family: Family
    rules: tuple[tuple[Mark, int], ...]
    tables: tuple[int, ...]


def present() -> tuple[PolicyRoute, ...]:
    """What is ours now. Half of one, left by a crash, stands as a route without a mark, or into table 0."""
    return tuple(route for family in Family for route in _paired(_halves(family)))


def overriding(wanted: Sequence[PolicyRoute]) -> Iterator[str]:
    """Routes of others in the tables of `wanted` that win over ours, for some packet at least, and do not deliver locally."""
    for family, table in dict.fromkeys((route.family, route.table) for route in wanted):
        number = ADDRESS_FAMILIES[family]
        asked = _ROUTE.pack(number, 0, 0, 0, table if table < 256 else 0, 0, 0, 0, 0) + netlink.attr(RTA_TABLE, _packed(table))
        for answer in _dump(RTM_GETROUTE, asked):
            _, dst_length, src_length, tos, short_table, _, _, kind, _ = _ROUTE.unpack_from(answer)
            attributes = netlink.parse_attrs(answer[_ROUTE.size :])
            metric = _u32(attributes.get(RTA_PRIORITY), 0)
            wins = dst_length or src_length or tos or metric <= METRIC
            # Istio puts a route like ours there: it does the same, whoever wins.
            if kind != RTN_LOCAL and wins and _u32(attributes.get(RTA_TABLE), short_table) == table:
                yield f"IP{family.value} table {table}: {_shown(number, kind, dst_length, attributes)} metric {metric}"


def _shown(family: int, kind: int, dst_length: int, attributes: dict[int, bytes]) -> str:
    """As ip-route(8) takes it."""
    words = [RTN_NAMES.get(kind, str(kind))]
    words.append(f"{socket.inet_ntop(family, attributes[RTA_DST])}/{dst_length}" if RTA_DST in attributes else "default")
    if RTA_GATEWAY in attributes:
        words += ["via", socket.inet_ntop(family, attributes[RTA_GATEWAY])]
    if RTA_OIF in attributes:
        words += ["dev", _interface(_u32(attributes[RTA_OIF], 0))]
    return " ".join(words)


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it went a moment ago
        return f"if{index}"


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


def remove_all() -> bool:
    """Take away all that is ours; whether there was anything. Raises BackendError."""
    found = bool(present())
    ensure(())
    return found


def _paired(held: _Halves) -> Iterator[PolicyRoute]:
    for mark, table in held.rules:
        yield PolicyRoute(held.family, mark, table if table in held.tables else NO_TABLE)
    led_to = {table for _, table in held.rules}
    for table in held.tables:
        if table not in led_to:
            yield PolicyRoute(held.family, NO_MARK, table)


def _halves(family: Family) -> _Halves:
    address_family = ADDRESS_FAMILIES[family]
    rules: list[tuple[Mark, int]] = []
    for answer in _dump(RTM_GETRULE, _RULE.pack(address_family, 0, 0, 0, 0, 0, 0, 0, 0)):
        header, attributes = _RULE.unpack_from(answer), netlink.parse_attrs(answer[_RULE.size :])
        ours = attributes.get(FRA_PROTOCOL) == bytes([PROTOCOL]) and _u32(attributes.get(FRA_PRIORITY), 0) == PRIORITY
        if header[0] == address_family and ours:
            mark = Mark(_u32(attributes.get(FRA_FWMARK), 0), _u32(attributes.get(FRA_FWMASK), 0))
            rules.append((mark, _u32(attributes.get(FRA_TABLE), header[4])))
    tables: list[int] = []
    for answer in _dump(RTM_GETROUTE, _ROUTE.pack(address_family, 0, 0, 0, 0, PROTOCOL, 0, 0, 0)):
        header, attributes = _ROUTE.unpack_from(answer), netlink.parse_attrs(answer[_ROUTE.size :])
        length_of_dst = header[1]
        if (header[0], length_of_dst, header[5], header[7]) == (address_family, 0, PROTOCOL, RTN_LOCAL):
            tables.append(_u32(attributes.get(RTA_TABLE), header[4]))
    return _Halves(family, tuple(rules), tuple(tables))


def _dump(kind: int, payload: bytes) -> list[bytes]:
    try:
        return netlink.dump(netlink.NETLINK_ROUTE, kind, payload)
    except OSError as error:
        # A kernel without IPv6, or without policy routing; a table that does not exist.
        if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT):
            return []
        raise BackendError(f"listing ip rules and routes: {error.strerror or error}") from error


def _u32(payload: bytes | None, otherwise: int) -> int:
    return int.from_bytes(payload, "little" if struct.pack("=H", 1) == b"\x01\x00" else "big") if payload else otherwise


def _packed(number: int) -> bytes:
    return struct.pack("=I", number)


def _opened() -> IPRoute | RouteMessages:
    try:
        from pyroute2 import IPRoute  # 180–250 ms: only when there is something to change
    except ModuleNotFoundError:
        from interceptor.backends.route_messages import RouteMessages

        return RouteMessages()
    return IPRoute()


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
