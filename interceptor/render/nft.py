"""Render a Plan as nft text: one table for both families, one transaction. No I/O; applying it is backends/nft.py's business.

Rules are written as `nft --stateless --numeric-priority list` prints them, so that what the kernel gives back can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import assert_never

from interceptor.plan.model import (
    TIMEOUTS,
    Announce,
    Chain,
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
    Tproxy,
    Verdict,
    Zone,
    timeout_name,
)
from interceptor.render import names
from interceptor.values import MAX_MARK, Family, IdRange, Mark, Network, PortRange, kernel_text

TABLE = names.NFT_TABLE
L3 = {Family.V4: "ip", Family.V6: "ip6"}
NFPROTO = {Family.V4: "ipv4", Family.V6: "ipv6"}
# Hook types and priorities, linux/netfilter_ipv4.h: raw -300, conntrack -200, mangle -150, dstnat -100. NAT sits one before
# dstnat, so that other programs' NAT does not take a packet first; timeouts one before mangle, for the same reason.
BASE = {
    (Table.RAW, Hook.OUTPUT): ("filter", -300),
    (Table.TIMEOUT, Hook.OUTPUT): ("filter", -151),
    (Table.MANGLE, Hook.OUTPUT): ("route", -150),
    (Table.MANGLE, Hook.PREROUTING): ("filter", -150),
    (Table.NAT, Hook.OUTPUT): ("nat", -101),
    (Table.NAT, Hook.PREROUTING): ("nat", -101),
}
ANNOUNCED = names.NFT_ANNOUNCED
_CONSTANT, _ELEMENT = "meta mark & 0x00000000", "0x00000000"
_FIRST_PACKET = "tcp flags syn / fin,syn,rst,ack"
_FIRST_PACKET_NEW = "tcp flags & (fin | syn | rst | ack) == syn"  # as nft 1.1 lists it
_DURATION = r"\b(?:\d+[dhms])+\b"
_PARTS = r"\d+[dhms]"
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def script(plan: Plan) -> str:
    """The whole of `plan` as input for `nft -f`: replaces whatever table of ours is there, in one transaction."""
    return f"{delete()}{table(plan)}"


def delete() -> str:
    """Input for `nft -f` that removes our table; succeeds when there is none."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def table(plan: Plan) -> str:
    """Our table, as a block."""
    blocks = [*_timeouts(plan), *_announced(plan), *(_chain_block(chain, plan) for chain in plan.chains)]
    body = "\n".join(blocks)
    return f"table inet {TABLE} {{\n{body}}}\n"


def chain_name(chain: Chain) -> str:
    """The name in the kernel; all tables of the plan share one nft table."""
    return name_of(chain.table, chain.name)


def name_of(in_table: Table, name: str) -> str:
    """The same for a chain that a rule leads to."""
    return f"{in_table.value}_{name}".lower()


def _timeouts(plan: Plan) -> Iterator[str]:
    for policy in plan.timeout_policies:
        seconds = ", ".join(f"{state} : {value}" for state, value in TIMEOUTS[policy].items())
        for family in plan.families:
            yield (
                f"\tct timeout {timeout_name(policy, family)} {{\n\t\tprotocol tcp\n\t\tl3proto {L3[family]}\n"
                f"\t\tpolicy = {{ {seconds} }}\n\t}}\n"
            )


def _announced(plan: Plan) -> Iterator[str]:
    if plan.waiting:
        begins = f"\t\telements = {{ {_ELEMENT} }}\n" if plan.announced else ""
        yield f"\tset {ANNOUNCED} {{\n\t\ttype mark\n\t\tsize 1\n\t\tflags dynamic\n{begins}\t}}\n"


def _chain_block(chain: Chain, plan: Plan) -> str:
    lines = [f"\tchain {chain_name(chain)} {{"]
    if chain.hook is not None:
        kind, priority = BASE[chain.table, chain.hook]
        lines.append(f"\t\ttype {kind} hook {chain.hook.value.lower()} priority {priority}; policy accept;")
    lines += [f"\t\t{line}" for line in rules(chain, plan.families)]
    return "\n".join((*lines, "\t}", ""))


def rules(chain: Chain, families: Iterable[Family]) -> list[str]:
    """The chain's rules, one line each, in order."""
    return [line for rule in chain.rules for line in statements(chain.table, rule, tuple(families))]


def statements(in_table: Table, rule: Rule, families: tuple[Family, ...]) -> Iterator[str]:
    """The rule as nft writes it; several lines where families or owners need one each."""
    for family in families_of(rule, families):
        for condition in _conditions(rule.match, family):
            for action in _actions(in_table, rule.verdict, family):
                parts = (condition, "" if isinstance(rule.verdict, Log) else "counter", action, f'comment "{rule.why}"')
                yield " ".join(filter(None, parts))


def families_of(rule: Rule, covered: tuple[Family, ...]) -> tuple[Family | None, ...]:
    """The families that need a line of their own; (None,) when one line serves all."""
    match = rule.match
    if match.family is not None:
        return (match.family,)
    if match.src or match.dst:
        lists = [networks for networks in (match.src, match.dst) if networks]
        return tuple(
            family for family in Family if all(any(Family.of(item) is family for item in networks) for networks in lists)
        )
    if isinstance(rule.verdict, ShortTimeouts):
        return covered
    return (None,)


def _conditions(match: Match, family: Family | None) -> Iterator[str]:
    parts = [*_header_parts(match, family), *_address_type(match)]
    owners = {"uids": f"meta skuid {_set(match.uids)}", "gids": f"meta skgid {_set(match.gids)}", "": ""}
    for owner in owners_of(match):
        yield " ".join(filter(None, (*parts, owners[owner], *_state_parts(match))))


def owners_of(match: Match) -> tuple[str, ...]:
    """Which fields of owners need a line of their own: either may be the sender's."""
    return tuple(name for name, wanted in (("uids", match.uids), ("gids", match.gids)) if wanted) or ("",)


def _header_parts(match: Match, family: Family | None) -> Iterator[str]:
    addresses = [
        f"{L3[family]} {end} {_networks(networks, family)}"
        for end, networks in (("saddr", match.src), ("daddr", match.dst))
        if networks and family is not None
    ]
    if family is not None and not addresses:
        yield f"meta nfproto {NFPROTO[family]}"
    if match.in_interface:
        yield f'iifname "{match.in_interface}"'
    if match.out_interface:
        yield f'oifname "{match.out_interface}"'
    yield from addresses
    if match.proto is not None and not match.dports and not match.syn:
        yield f"meta l4proto {match.proto.value}"
    if match.proto is not None and match.dports:
        yield f"{match.proto.value} dport {_set(match.dports)}"
    if match.syn:
        yield _FIRST_PACKET


def _address_type(match: Match) -> Iterator[str]:
    for end, wanted in (("saddr", match.src_is_local), ("daddr", match.dst_is_local)):
        if wanted is not None:
            yield f"fib {end} type {'' if wanted else '!= '}local"


def _state_parts(match: Match) -> Iterator[str]:
    if match.cgroup is not None:
        yield f'socket cgroupv2 level {match.cgroup.count("/") + 1} "{match.cgroup}"'
    if match.mark is not None:
        yield _mark_test("meta mark", match.mark)
    if match.connmark is not None:
        yield _mark_test("ct mark", match.connmark)
    if match.invalid:
        yield "ct state invalid"
    if match.direction is not None:
        yield f"ct direction {match.direction.value}"
    if match.untranslated:
        yield "ct status ! dnat"
    if match.announced is not None:
        yield f"{_CONSTANT} {'==' if match.announced else '!='} @{ANNOUNCED}"


def _mark_test(left: str, mark: Mark) -> str:
    if mark.mask == MAX_MARK:
        return f"{left} {mark.value:#010x}"
    return f"{left} & {mark.mask:#010x} == {mark.value:#010x}"


def _mark_assignment(left: str, mark: Mark) -> str:
    if mark.mask == MAX_MARK:
        return f"{left} set {mark.value:#010x}"
    # nft writes the bits that are set afterwards as kept, too: (x & kept) | value == (x & (kept | value)) | value.
    kept = (~mark.mask & MAX_MARK) | mark.value
    return f"{left} set {left} & {kept:#010x}" + (f" | {mark.value:#010x}" if mark.value else "")


def _set(values: tuple[PortRange, ...] | tuple[IdRange, ...]) -> str:
    return str(values[0]) if len(values) == 1 else "{ " + ", ".join(str(value) for value in values) + " }"


def _networks(networks: tuple[Network, ...], family: Family) -> str:
    # The kernel keeps intervals and joins those that touch; nft then lists a range, which no prefix need be.
    runs: list[list[Network]] = []
    for item in sorted((item for item in networks if Family.of(item) is family), key=lambda item: int(item.network_address)):
        if runs and int(item.network_address) == int(runs[-1][-1].broadcast_address) + 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    members = [_run(run) for run in runs]
    return members[0] if len(members) == 1 else "{ " + ", ".join(members) + " }"


def _run(run: list[Network]) -> str:
    if len(run) == 1:
        return _network(run[0])
    return f"{kernel_text(run[0].network_address)}-{kernel_text(run[-1].broadcast_address)}"


def _network(network: Network) -> str:
    whole = network.prefixlen == network.max_prefixlen
    return kernel_text(network.network_address) + ("" if whole else f"/{network.prefixlen}")


def _actions(in_table: Table, verdict: Verdict, family: Family | None) -> tuple[str, ...]:
    match verdict:
        case Return():
            return ("return",)
        case Drop():
            return ("drop",)
        case Redirect(port):
            return (f"redirect to :{port}",)
        case Tproxy(port, mark):
            # Where nobody listens, nft goes on to the next rule (xt_TPROXY drops): without the second line it would leak.
            # A rule that matches one family must name it here again, or nft refuses it.
            named = f"{L3[family]} " if family is not None else ""
            return (f"{_mark_assignment('meta mark', mark)} tproxy {named}to :{port} accept", "drop")
        case Announce():
            return (f"add @{ANNOUNCED} {{ {_CONSTANT} }} drop",)
        case SetMark(mark):
            return (_mark_assignment("meta mark", mark),)
        case SetConnmark(mark):
            return (_mark_assignment("ct mark", mark),)
        case Zone(number):
            return (f"ct original zone set {number}",)
        case ShortTimeouts(policy):
            assert family is not None
            return (f'ct timeout set "{timeout_name(policy, family)}"',)
        case Log(prefix):
            return (f'log prefix "{prefix}"',)
        case Jump(chain):
            return (f"jump {name_of(in_table, chain)}",)
        case Goto(chain):
            return (f"goto {name_of(in_table, chain)}",)
        case Rewrite():
            raise AssertionError("decided when a socket is connected, never by a rule")
        case _:
            assert_never(verdict)


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """The blocks of a table, as rendered or as listed: name -> lines. A base chain's first line is its hook and priority."""
    blocks: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        stripped = _as_rendered(line.strip())
        if stripped.endswith("{") and stripped.startswith(("chain ", "ct timeout ", "set ")):
            current = blocks.setdefault(stripped.removesuffix("{").removeprefix("chain ").strip(), [])
        elif stripped.startswith("flags ") and not blocks:
            blocks["table flags"] = [stripped]
        elif stripped.startswith("elements = "):
            continue  # a state, which comes and goes by itself
        elif stripped and stripped != "}" and not stripped.startswith("table "):
            current.append(stripped)
    return {name: tuple(lines) for name, lines in blocks.items()}


def _as_rendered(line: str) -> str:
    """A line as we write it and nft 1.0 lists it: nft 1.1 lists flags in another form, and seconds with units ("1m5s")."""
    if line.startswith("policy = {"):
        return re.sub(
            _DURATION, lambda found: str(sum(int(each[:-1]) * _UNITS[each[-1]] for each in re.findall(_PARTS, found[0]))), line
        )
    return line.replace(_FIRST_PACKET_NEW, _FIRST_PACKET)


def comments(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Each chain's rule comments in order: what can be read from the kernel without nft."""
    return {
        chain_name(chain): tuple(rule.why for rule in chain.rules for _ in statements(chain.table, rule, plan.families))
        for chain in plan.chains
    }
