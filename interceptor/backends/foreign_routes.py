"""Others' routes and ip rules that take packets which our policy routes are meant for. Only looks.

A route wins within our table; an `ip rule` wins when it stands before ours, may match a packet with our mark, and leads to
anything else than this host itself. What a rule's table holds counts: a rule into an empty table takes nothing.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from interceptor import nlattr
from interceptor.backends.routes import (
    ADDRESS_FAMILIES,
    FRA_FWMARK,
    FRA_FWMASK,
    FRA_PRIORITY,
    FRA_PROTOCOL,
    FRA_TABLE,
    METRIC,
    PRIORITY,
    PROTOCOL,
    ROUTE,
    RTA_TABLE,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTN_LOCAL,
    RULE,
    dump,
    u32,
)
from interceptor.plan.model import PolicyRoute
from interceptor.values import Family, Mark

RTN_THROW = 9  # linux/rtnetlink.h, to the end of this block
RTN_NAMES = {1: "unicast", 6: "blackhole", 7: "unreachable", 8: "prohibit", RTN_THROW: "throw"}
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
# Routes that take no packet from its way to this host; `throw` says to look further.
HARMLESS = frozenset({RTN_LOCAL, RTN_THROW})
LOCAL_TABLE = 255  # RT_TABLE_LOCAL: the kernel's own, of this host's addresses
FRA_DST = 1  # linux/fib_rules.h, to the end of this block
FRA_SRC = 2
FRA_IIFNAME = 3
FRA_GOTO = 4
FRA_SUPPRESS_PREFIXLEN = 14
FRA_OIFNAME = 17
FRA_L3MDEV = 19
FRA_UID_RANGE = 20
FRA_IP_PROTO = 22
FRA_SPORT_RANGE = 23
FRA_DPORT_RANGE = 24
FR_ACT_TO_TBL = 1
FR_ACT_GOTO = 2
FR_ACT_NOP = 3
FR_ACT_NAMES = {6: "blackhole", 7: "unreachable", 8: "prohibit"}
FIB_RULE_INVERT = 2
NO_SUPPRESSION = 0xFFFFFFFF
TABLE_NAMES = {253: "default", 254: "main", LOCAL_TABLE: "local"}
# What a rule may ask for besides the mark.
SELECTORS = {
    FRA_SRC: "from",
    FRA_DST: "to",
    FRA_IIFNAME: "iif",
    FRA_OIFNAME: "oif",
    FRA_UID_RANGE: "uidrange",
    FRA_IP_PROTO: "ipproto",
    FRA_SPORT_RANGE: "sport",
    FRA_DPORT_RANGE: "dport",
}


@dataclass(frozen=True, slots=True)
class IpRule:
    """One `ip rule`. `selectors`: what it asks for besides the mark, as ip-rule(8) takes it."""

    priority: int
    mark: Mark
    selectors: tuple[str, ...]
    is_inverted: bool
    action: int
    table: int
    goto: int
    suppressed: int  # routes with prefixes no longer than this do not count; -1: all do
    is_l3mdev: bool
    is_ours: bool

    def may_match(self, packet: Mark) -> bool:
        """Whether some packet that has the mark `packet` is one of the rule's."""
        common = self.mark.mask & packet.mask
        may = not (self.mark.value ^ packet.value) & common
        # Of an inverted rule, those that match for certain are not.
        certain = may and common == self.mark.mask and not self.selectors
        return not certain if self.is_inverted else may

    def __str__(self) -> str:
        words = ["not"] * self.is_inverted + list(self.selectors or ("from all",))
        if self.mark.mask:
            words.append(f"fwmark {self.mark}")
        if self.action == FR_ACT_TO_TBL:
            words.append(f"lookup {TABLE_NAMES.get(self.table, self.table)}")
        elif self.action == FR_ACT_GOTO:
            words.append(f"goto {self.goto}")
        else:
            words.append(FR_ACT_NAMES.get(self.action, str(self.action)))
        return f"{self.priority}: {' '.join(words)}"


def outranking(wanted: Sequence[PolicyRoute]) -> Iterator[str]:
    """Rules of others that take packets of the marks of `wanted` elsewhere, before our own rule is looked at."""
    for family in dict.fromkeys(route.family for route in wanted):
        marks = [route.mark for route in wanted if route.family is family]
        for rule in _before_ours(family):
            if any(rule.may_match(mark) for mark in marks) and _leads_away(family, rule):
                yield f"IP{family.value} rule {rule}"


def overriding(wanted: Sequence[PolicyRoute]) -> Iterator[str]:
    """Routes of others in the tables of `wanted` that win over ours, for some packet at least, and do not deliver locally."""
    for family, table in dict.fromkeys((route.family, route.table) for route in wanted):
        number = ADDRESS_FAMILIES[family]
        asked = ROUTE.pack(number, 0, 0, 0, table if table < 256 else 0, 0, 0, 0, 0) + nlattr.attr(
            RTA_TABLE, struct.pack("=I", table)
        )
        for answer in dump(RTM_GETROUTE, asked):
            _, dst_length, src_length, tos, short_table, _, _, kind, _ = ROUTE.unpack_from(answer)
            attributes = nlattr.parse_attrs(answer[ROUTE.size :])
            metric = u32(attributes.get(RTA_PRIORITY), 0)
            wins = dst_length or src_length or tos or metric <= METRIC
            # Istio puts a route like ours there: it does the same, whoever wins.
            if kind != RTN_LOCAL and wins and u32(attributes.get(RTA_TABLE), short_table) == table:
                yield f"IP{family.value} table {table}: {_shown(number, kind, dst_length, attributes)} metric {metric}"


def _shown(family: int, kind: int, dst_length: int, attributes: dict[int, bytes]) -> str:
    """As ip-route(8) takes it."""
    words = [RTN_NAMES.get(kind, str(kind))]
    words.append(f"{socket.inet_ntop(family, attributes[RTA_DST])}/{dst_length}" if RTA_DST in attributes else "default")
    if RTA_GATEWAY in attributes:
        words += ["via", socket.inet_ntop(family, attributes[RTA_GATEWAY])]
    if RTA_OIF in attributes:
        words += ["dev", _interface(u32(attributes[RTA_OIF], 0))]
    return " ".join(words)


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it went a moment ago
        return f"if{index}"


def _before_ours(family: Family) -> Iterator[IpRule]:
    # The kernel lists them in the order in which it asks them; ours, if it stands, comes behind what has its priority already.
    for answer in dump(RTM_GETRULE, RULE.pack(ADDRESS_FAMILIES[family], 0, 0, 0, 0, 0, 0, 0, 0)):
        rule = _ip_rule(ADDRESS_FAMILIES[family], answer)
        if rule is None:
            continue
        if rule.is_ours or rule.priority > PRIORITY:
            return
        yield rule


def _ip_rule(family: int, answer: bytes) -> IpRule | None:
    family_, dst_length, src_length, tos, table, _, _, action, flags = RULE.unpack_from(answer)
    if family_ != family:
        return None
    attributes = nlattr.parse_attrs(answer[RULE.size :])
    priority = u32(attributes.get(FRA_PRIORITY), 0)
    suppressed = u32(attributes.get(FRA_SUPPRESS_PREFIXLEN), NO_SUPPRESSION)
    return IpRule(
        priority,
        Mark(u32(attributes.get(FRA_FWMARK), 0), u32(attributes.get(FRA_FWMASK), 0)),
        tuple(_selectors(family, attributes, {FRA_SRC: src_length, FRA_DST: dst_length}, tos)),
        bool(flags & FIB_RULE_INVERT),
        action,
        u32(attributes.get(FRA_TABLE), table),
        u32(attributes.get(FRA_GOTO), 0),
        -1 if suppressed == NO_SUPPRESSION else suppressed,
        attributes.get(FRA_L3MDEV) == b"\1",
        attributes.get(FRA_PROTOCOL) == bytes([PROTOCOL]) and priority == PRIORITY,
    )


def _selectors(family: int, attributes: dict[int, bytes], lengths: dict[int, int], tos: int) -> Iterator[str]:
    for kind, name in SELECTORS.items():
        if kind not in attributes:
            continue
        raw = attributes[kind]
        if kind in lengths:
            yield f"{name} {socket.inet_ntop(family, raw)}/{lengths[kind]}"
        elif kind in (FRA_IIFNAME, FRA_OIFNAME):
            yield f"{name} {raw.rstrip(bytes(1)).decode(errors='replace')}"
        elif kind == FRA_IP_PROTO:
            yield f"{name} {raw[0]}"
        else:  # two numbers, of two bytes or of four
            half = len(raw) // 2
            yield f"{name} {u32(raw[:half], 0)}-{u32(raw[half:], 0)}"
    if tos:
        yield f"tos {tos:#x}"


def _leads_away(family: Family, rule: IpRule) -> bool:
    if rule.action == FR_ACT_GOTO:
        return rule.goto > PRIORITY
    if rule.action != FR_ACT_TO_TBL:
        return rule.action != FR_ACT_NOP
    # A VRF's rule is for packets of its interfaces alone.
    if rule.is_l3mdev or rule.table == LOCAL_TABLE:
        return False
    asked = ROUTE.pack(ADDRESS_FAMILIES[family], 0, 0, 0, 0, 0, 0, 0, 0)
    for answer in dump(RTM_GETROUTE, asked):
        header, attributes = ROUTE.unpack_from(answer), nlattr.parse_attrs(answer[ROUTE.size :])
        leads = header[7] not in HARMLESS and header[1] > rule.suppressed
        if leads and u32(attributes.get(RTA_TABLE), header[4]) == rule.table:
            return True
    return False
