"""Render a Plan as nf_tables objects: the attributes that render/nft.py's text becomes when nft loads it. Pure.

The same rules in the same order as the text; tests load both, and compare what the kernel gives back. Numbers from
linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink_cttimeout.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import assert_never

from interceptor.nlattr import attr, nested
from interceptor.plan.model import (
    TIMEOUTS,
    Announce,
    Chain,
    Direction,
    Drop,
    Goto,
    Hook,
    Jump,
    Log,
    Match,
    Plan,
    Redirect,
    Return,
    Rewrite,
    Rule,
    SetConnmark,
    SetMark,
    ShortTimeouts,
    Table,
    TimeoutPolicy,
    Tproxy,
    Verdict,
    Zone,
    timeout_name,
)
from interceptor.render import nft, nft_sets
from interceptor.render import nft_expressions as expressions
from interceptor.render.nft_expressions import host, number, port, signed, text
from interceptor.render.nft_sets import Asked, Set
from interceptor.values import MAX_MARK, Family, Mark, Proto

NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 4, 5, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFTA_OBJ_TYPE, NFTA_OBJ_DATA = 3, 4
NFTNL_UDATA_RULE_COMMENT = 0
NFPROTO = {Family.V4: 2, Family.V6: 10}  # linux/netfilter.h: AF_INET, AF_INET6
L4PROTO = {Proto.TCP: 6, Proto.UDP: 17}  # linux/in.h
_HOOKS = {Hook.PREROUTING: 0, Hook.OUTPUT: 3}  # NF_INET_, linux/netfilter.h
_RTN_LOCAL = 2  # linux/rtnetlink.h
_FLAGS_AT, _FIRST, _OF_FLAGS = 13, 0x02, 0x17  # in TCP's header: SYN, of FIN, SYN, RST, ACK
_CT_STATE_INVALID = 1  # NF_CT_STATE_INVALID_BIT, linux/netfilter/nf_conntrack_common.h
_IPS_DST_NAT = 1 << 5
_CT_DIRECTIONS = {Direction.ORIGINAL: 0, Direction.REPLY: 1}
# Seconds of each TCP state as nft 1.0 and 1.1 fill in what a script leaves out, by CTA_TIMEOUT_TCP_: syn_sent, syn_recv,
# established, fin_wait, close_wait, last_ack, time_wait, close, syn_sent2, retrans, unack.
_TCP_TIMEOUTS = dict(enumerate((120, 60, 432000, 120, 60, 30, 120, 10, 120, 300, 300), start=1))
_TCP_STATES = {"fin_wait": 4, "close": 8}


@dataclass(frozen=True, slots=True)
class RuleBytes:
    """A rule's expressions and its userdata, which holds the comment."""

    expressions: bytes
    userdata: bytes


@dataclass(frozen=True, slots=True)
class TableBytes:
    """All of our table, by name and in order; each object's attributes without its table's name and its own."""

    chains: Mapping[str, bytes]
    timeouts: Mapping[str, bytes]
    sets: Mapping[str, Set]
    rules: Mapping[str, tuple[RuleBytes, ...]]


def table(plan: Plan, cgroups: Mapping[str, int]) -> TableBytes:
    """Our table. `cgroups`: the number of each cgroup v2 path that a rule names; KeyError when one is missing."""
    rendering = _Rendering(cgroups)
    if plan.waiting:
        rendering.sets[nft.ANNOUNCED] = nft_sets.announced(plan.announced)
    rules = {
        nft.chain_name(chain): tuple(
            RuleBytes(each, _comment(rule.why))
            for rule in chain.rules
            for each in rendering.rule(chain.table, rule, plan.families)
        )
        for chain in plan.chains
    }
    timeouts = {
        timeout_name(policy, family): _timeouts(policy, family) for policy in plan.timeout_policies for family in plan.families
    }
    return TableBytes({nft.chain_name(chain): _chain(chain) for chain in plan.chains}, timeouts, rendering.sets, rules)


def _comment(why: str) -> bytes:
    content = why.encode() + b"\0"
    return bytes([NFTNL_UDATA_RULE_COMMENT, len(content)]) + content


def _chain(chain: Chain) -> bytes:
    if chain.hook is None:
        return b""
    kind, priority = nft.BASE[chain.table, chain.hook]
    hook = number(NFTA_HOOK_HOOKNUM, _HOOKS[chain.hook]) + signed(NFTA_HOOK_PRIORITY, priority)
    return attr(NFTA_CHAIN_HOOK, hook) + number(NFTA_CHAIN_POLICY, expressions.NF_ACCEPT) + text(NFTA_CHAIN_TYPE, kind)


def _timeouts(policy: TimeoutPolicy, family: Family) -> bytes:
    seconds = _TCP_TIMEOUTS | {_TCP_STATES[state]: value for state, value in TIMEOUTS[policy].items()}
    # NFTA_CT_TIMEOUT_L3PROTO 1, _L4PROTO 2, _DATA 3
    protocols = attr(2, bytes([L4PROTO[Proto.TCP]])) + attr(1, NFPROTO[family].to_bytes(2, "big"))
    values = nested(3, *(number(state, value) for state, value in seconds.items()))
    return number(NFTA_OBJ_TYPE, expressions.NFT_OBJECT_CT_TIMEOUT) + attr(NFTA_OBJ_DATA, protocols + values)


class _Rendering:
    """Renders rules, and collects the anonymous sets that they ask, named as the kernel would name them."""

    def __init__(self, cgroups: Mapping[str, int]) -> None:
        self.sets: dict[str, Set] = {}
        self._cgroups = cgroups
        self._anonymous = 0

    def rule(self, in_table: Table, rule: Rule, families: tuple[Family, ...]) -> Iterator[bytes]:
        """The expressions of each line that nft.statements() gives."""
        counted = b"" if isinstance(rule.verdict, Log) else expressions.counter()
        for family in nft.families_of(rule, families):
            actions = _actions(in_table, rule.verdict, family)
            # Each line has sets of its own, as nft makes them.
            for owner in nft.owners_of(rule.match):
                for action in actions:
                    yield self._conditions(rule.match, family, owner) + counted + action

    def _conditions(self, match: Match, family: Family | None, owner: str) -> bytes:
        parts = [self._headers(match, family), _address_type(match)]
        if owner == "uids":
            parts.append(self._asked(nft_sets.owners(expressions.NFT_META_SKUID, match.uids, self._name())))
        elif owner == "gids":
            parts.append(self._asked(nft_sets.owners(expressions.NFT_META_SKGID, match.gids, self._name())))
        return b"".join((*parts, self._cgroup(match), _state(match)))

    def _headers(self, match: Match, family: Family | None) -> bytes:
        parts: list[bytes] = []
        if match.in_interface:
            parts.append(_interface(expressions.NFT_META_IIFNAME, match.in_interface))
        if match.out_interface:
            parts.append(_interface(expressions.NFT_META_OIFNAME, match.out_interface))
        if family is not None:
            asked = expressions.meta(expressions.NFT_META_NFPROTO) + expressions.cmp(bytes([NFPROTO[family]]))
            if match.src or match.dst:
                parts.append(asked)
                parts += self._addresses(match, family)
            else:
                parts.insert(0, asked)
        if match.proto is not None:
            parts.append(expressions.meta(expressions.NFT_META_L4PROTO) + expressions.cmp(bytes([L4PROTO[match.proto]])))
            if match.dports:
                parts.append(self._asked(nft_sets.ports(match.proto, match.dports, self._name())))
        if match.syn:
            parts.append(_first_packet(match))
        return b"".join(parts)

    def _addresses(self, match: Match, family: Family) -> Iterator[bytes]:
        for end, networks in (("saddr", match.src), ("daddr", match.dst)):
            if networks:
                of_family = [item for item in networks if Family.of(item) is family]
                yield self._asked(nft_sets.networks(family, end, of_family, self._name()))

    def _cgroup(self, match: Match) -> bytes:
        if match.cgroup is None:
            return b""
        found = host(self._cgroups[match.cgroup], 8)
        return expressions.cgroup(match.cgroup.count("/") + 1) + expressions.cmp(found)

    def _name(self) -> str:
        return f"__set{self._anonymous}"

    def _asked(self, asked: Asked) -> bytes:
        if asked.needs is not None:
            self.sets[self._name()] = asked.needs
            self._anonymous += 1
        return asked.expressions


def _first_packet(match: Match) -> bytes:
    load = expressions.payload(expressions.NFT_PAYLOAD_TRANSPORT_HEADER, _FLAGS_AT, 1)
    flags = load + expressions.bitwise(bytes([_OF_FLAGS]), b"\0") + expressions.cmp(bytes([_FIRST]))
    if match.proto is not None:
        return flags
    return expressions.meta(expressions.NFT_META_L4PROTO) + expressions.cmp(bytes([L4PROTO[Proto.TCP]])) + flags


def _interface(key: int, name: str) -> bytes:
    return expressions.meta(key) + expressions.cmp(name.encode().ljust(expressions.IFNAMSIZ, b"\0"))


def _address_type(match: Match) -> bytes:
    asked = b""
    ends = ((expressions.NFTA_FIB_F_SADDR, match.src_is_local), (expressions.NFTA_FIB_F_DADDR, match.dst_is_local))
    for flag, wanted in ends:
        if wanted is not None:
            operator = expressions.NFT_CMP_EQ if wanted else expressions.NFT_CMP_NEQ
            asked += expressions.fib(flag) + expressions.cmp(host(_RTN_LOCAL), operator)
    return asked


def _state(match: Match) -> bytes:
    parts: list[bytes] = []
    if match.mark is not None:
        parts.append(expressions.meta(expressions.NFT_META_MARK) + _is_mark(match.mark))
    if match.connmark is not None:
        parts.append(expressions.ct(expressions.NFT_CT_MARK) + _is_mark(match.connmark))
    if match.invalid:
        masked = expressions.bitwise(host(_CT_STATE_INVALID), bytes(4))
        parts.append(expressions.ct(expressions.NFT_CT_STATE) + masked + expressions.cmp(bytes(4), expressions.NFT_CMP_NEQ))
    if match.direction is not None:
        direction = bytes([_CT_DIRECTIONS[match.direction]])
        parts.append(expressions.ct(expressions.NFT_CT_DIRECTION) + expressions.cmp(direction))
    if match.untranslated:
        masked = expressions.bitwise(host(_IPS_DST_NAT), bytes(4))
        parts.append(expressions.ct(expressions.NFT_CT_STATUS) + masked + expressions.cmp(bytes(4)))
    if match.announced is not None:
        flags = 0 if match.announced else expressions.NFT_LOOKUP_F_INV
        parts.append(_constant() + expressions.lookup(nft.ANNOUNCED, flags))
    return b"".join(parts)


def _constant() -> bytes:
    return expressions.meta(expressions.NFT_META_MARK) + expressions.bitwise(bytes(4), bytes(4))


def _is_mark(mark: Mark) -> bytes:
    masked = b"" if mark.mask == MAX_MARK else expressions.bitwise(host(mark.mask), bytes(4))
    return masked + expressions.cmp(host(mark.value))


def _assign_mark(load: bytes, store: bytes, mark: Mark) -> bytes:
    if mark.mask == MAX_MARK:
        return expressions.immediate(host(mark.value)) + store
    return load + expressions.bitwise(host(~mark.mask & MAX_MARK), host(mark.value)) + store


def _set_mark(mark: Mark) -> bytes:
    key = expressions.NFT_META_MARK
    return _assign_mark(expressions.meta(key), expressions.set_meta(key), mark)


def _actions(in_table: Table, verdict: Verdict, family: Family | None) -> tuple[bytes, ...]:
    match verdict:
        case Return():
            return (expressions.verdict(expressions.NFT_RETURN),)
        case Drop():
            return (expressions.verdict(expressions.NF_DROP),)
        case Redirect(to):
            return (expressions.immediate(port(to)) + expressions.redirect(),)
        case Tproxy(to, mark):
            given = expressions.immediate(port(to)) + expressions.tproxy(0 if family is None else NFPROTO[family])
            taken = _set_mark(mark) + given + expressions.verdict(expressions.NF_ACCEPT)
            return (taken, expressions.verdict(expressions.NF_DROP))
        case Announce():
            return (_constant() + expressions.add_to(nft.ANNOUNCED) + expressions.verdict(expressions.NF_DROP),)
        case SetMark(mark):
            return (_set_mark(mark),)
        case SetConnmark(mark):
            key = expressions.NFT_CT_MARK
            return (_assign_mark(expressions.ct(key), expressions.set_ct(key), mark),)
        case Zone(zone):
            return (expressions.immediate(host(zone, 2)) + expressions.set_original_zone(),)
        case ShortTimeouts(policy):
            assert family is not None
            return (expressions.timeouts(timeout_name(policy, family)),)
        case Log(prefix):
            return (expressions.log(prefix),)
        case Jump(chain):
            return (expressions.verdict(expressions.NFT_JUMP, nft.name_of(in_table, chain)),)
        case Goto(chain):
            return (expressions.verdict(expressions.NFT_GOTO, nft.name_of(in_table, chain)),)
        case Rewrite():
            raise AssertionError("decided when a socket is connected, never by a rule")
        case _:
            assert_never(verdict)
