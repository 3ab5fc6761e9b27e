"""Render a Plan as iptables-restore text, one IP family at a time. No I/O; applying it is backends/iptables.py's business.

Rules are written as iptables-save prints them, so that what the kernel gives back can be compared with what was meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import assert_never

from interceptor.plan.model import (
    Announce,
    Chain,
    Drop,
    Goto,
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
from interceptor.render.iptables_save import TableRules
from interceptor.values import Family, Network, PortRange, Proto, kernel_text

ANNOUNCED = names.IPTABLES_ANNOUNCED
MULTIPORT_SLOTS = 15  # XT_MULTI_PORTS, linux/netfilter/xt_multiport.h; a range takes two
TABLES = ("raw", "mangle", "nat")
IN_TABLE = {Table.RAW: "raw", Table.TIMEOUT: "raw", Table.MANGLE: "mangle", Table.NAT: "nat"}


def chain_name(chain: Chain) -> str:
    """The name in the kernel."""
    return _name(chain.table, chain.name)


def _name(table: Table, name: str) -> str:
    # raw/OUTPUT is entered for two concerns.
    return names.IPTABLES_PREFIX + ("TIMEOUT" if table is Table.TIMEOUT and name == "OUTPUT" else name)


def rules(plan: Plan, family: Family) -> dict[str, TableRules]:
    """Every table of ours for `family`, in the order of TABLES; tables without a rule are absent."""
    found: dict[str, TableRules] = {}
    for chain in _reachable(plan, family):
        table = found.setdefault(IN_TABLE[chain.table], TableRules())
        table.chains[chain_name(chain)] = [spec for rule in chain.rules for spec in specs(chain.table, rule, family)]
        if chain.hook is not None:
            table.jumps.setdefault(chain.hook.value, []).append(chain_name(chain))
    return {name: found[name] for name in TABLES if name in found}


def _reachable(plan: Plan, family: Family) -> list[Chain]:
    """The chains that a packet of `family` can come to, in the plan's order."""
    by_name = {(chain.table, chain.name): chain for chain in plan.chains}
    todo = [chain for chain in plan.chains if chain.hook is not None and any(_applies(rule, family) for rule in chain.rules)]
    seen: set[tuple[Table, str]] = set()
    while todo:
        chain = todo.pop()
        if (chain.table, chain.name) in seen:
            continue
        seen.add((chain.table, chain.name))
        targets = [
            rule.verdict.chain for rule in chain.rules if isinstance(rule.verdict, Jump | Goto) and _applies(rule, family)
        ]
        todo += [by_name[chain.table, target] for target in targets]
    return [chain for chain in plan.chains if (chain.table, chain.name) in seen]


def _applies(rule: Rule, family: Family) -> bool:
    return next(specs(Table.NAT, rule, family), None) is not None


def specs(table: Table, rule: Rule, family: Family) -> Iterator[str]:
    """The rule as iptables writes it, without `-A CHAIN`: one line for each combination of its alternatives."""
    match = rule.match
    if match.family not in (None, family):
        return
    alternatives = (
        _address_matches("-s", match.src, family),
        _address_matches("-d", match.dst, family),
        _port_matches(match),
        _owner_matches(match),
    )
    for source, destination, ports, owner in product(*alternatives):
        parts = (source, destination, _interfaces(match), ports, owner, *_other_matches(match, family), _comment(rule.why))
        yield " ".join((*filter(None, parts), _target(table, rule.verdict, family)))


def _address_matches(flag: str, networks: tuple[Network, ...], family: Family) -> list[str]:
    # iptables-save leaves out what matches everything.
    return [
        f"{flag} {kernel_text(network.network_address)}/{network.prefixlen}" if network.prefixlen else ""
        for network in networks
        if Family.of(network) is family
    ] or ([] if networks else [""])


def _interfaces(match: Match) -> str:
    given = (("-i", match.in_interface), ("-o", match.out_interface))
    return " ".join(f"{flag} {name}" for flag, name in given if name)


def _port_matches(match: Match) -> list[str]:
    if match.proto is None:
        return [""]
    proto = match.proto.value
    flags = " --tcp-flags FIN,SYN,RST,ACK SYN" if match.syn and match.proto is Proto.TCP else ""
    if not match.dports:
        return [f"-p {proto}" + (f" -m {proto}{flags}" if flags else "")]
    if len(match.dports) == 1:
        return [f"-p {proto} -m {proto} --dport {_ports(match.dports)}{flags}"]
    flags = f" -m {proto}{flags}" if flags else ""
    return [f"-p {proto}{flags} -m multiport --dports {_ports(chunk)}" for chunk in port_chunks(match.dports)]


def port_chunks(ports: tuple[PortRange, ...]) -> Iterator[tuple[PortRange, ...]]:
    """`ports` in pieces that one multiport match can hold."""
    chunk: list[PortRange] = []
    slots = 0
    for item in ports:
        size = 1 if item.first == item.last else 2
        if slots + size > MULTIPORT_SLOTS:
            yield tuple(chunk)
            chunk, slots = [], 0
        chunk.append(item)
        slots += size
    yield tuple(chunk)


def _ports(ports: tuple[PortRange, ...]) -> str:
    return ",".join(str(item).replace("-", ":") for item in ports)


def _owner_matches(match: Match) -> list[str]:
    owners = [f"-m owner --uid-owner {ids}" for ids in match.uids] + [f"-m owner --gid-owner {ids}" for ids in match.gids]
    return owners or [""]


def _list(family: Family) -> str:
    nothing = "0.0.0.0" if family is Family.V4 else "::"  # noqa: S104
    return f"--name {ANNOUNCED} --mask {nothing} --rsource"


def _other_matches(match: Match, family: Family) -> Iterator[str]:
    if match.cgroup is not None:
        raise ValueError("iptables rules cannot match a cgroup; Config refuses this combination")
    if match.mark is not None:
        yield f"-m mark --mark {match.mark}"
    if match.connmark is not None:
        yield f"-m connmark --mark {match.connmark}"
    if match.invalid:
        yield "-m conntrack --ctstate INVALID"
    if match.direction is not None:
        yield f"-m conntrack --ctdir {match.direction.value.upper()}"
    if match.untranslated:
        yield "-m conntrack ! --ctstate DNAT"
    for end, wanted in (("src", match.src_is_local), ("dst", match.dst_is_local)):
        if wanted is not None:
            yield f"-m addrtype {'' if wanted else '! '}--{end}-type LOCAL"
    if match.announced is not None:
        yield f"-m recent {'' if match.announced else '! '}--rcheck {_list(family)}"


def _comment(why: str) -> str:
    return f'-m comment --comment "{why}"'


def _target(table: Table, verdict: Verdict, family: Family) -> str:
    match verdict:
        case Return():
            return "-j RETURN"
        case Drop():
            return "-j DROP"
        case Redirect(port):
            return f"-j REDIRECT --to-ports {port}"
        case Tproxy(port, mark):
            anywhere = "0.0.0.0" if family is Family.V4 else "::"  # noqa: S104
            return f"-j TPROXY --on-port {port} --on-ip {anywhere} --tproxy-mark {mark.value:#x}/{mark.mask:#x}"
        case Announce():
            # A match that acts: it must be the last one.
            return f"-m recent --set {_list(family)} -j DROP"
        case SetMark(mark):
            return f"-j MARK --set-xmark {mark.value:#x}/{mark.mask:#x}"
        case SetConnmark(mark):
            return f"-j CONNMARK --set-xmark {mark.value:#x}/{mark.mask:#x}"
        case Zone(number):
            return f"-j CT --zone-orig {number}"
        case ShortTimeouts(policy):
            return f"-j CT --timeout {timeout_name(policy, family)}"
        case Log(prefix):
            return f'-j LOG --log-prefix "{prefix}"'
        case Jump(chain):
            return f"-j {_name(table, chain)}"
        case Goto(chain):
            return f"-g {_name(table, chain)}"
        case Rewrite():
            raise AssertionError("decided when a socket is connected, never by a rule")
        case _:
            assert_never(verdict)


def restore(wanted: Mapping[str, TableRules], present: Mapping[str, TableRules]) -> str:
    """iptables-restore text that turns the chains and jumps `present` into `wanted`, one transaction a table.

    Both are of one family. Chains that stay are refilled within the transaction, so there is no moment without rules.
    """
    return "".join(restore_table(name, wanted.get(name), present.get(name)) for name in TABLES)


def restore_table(name: str, wanted: TableRules | None, present: TableRules | None) -> str:
    """The same for one table; empty text when there is nothing to do."""
    wanted, present = wanted or TableRules(), present or TableRules()
    if not wanted.chains and not present.chains and not present.jumps and not present.strays:
        return ""
    stale = [chain for chain in present.chains if chain not in wanted.chains]
    lines = [f"*{name}"]
    # Naming a chain creates it, or empties it when it is there; both only with the COMMIT.
    lines += [f":{chain} - [0:0]" for chain in (*wanted.chains, *stale)]
    for hook in dict.fromkeys((*present.jumps, *wanted.jumps)):
        lines += [f"-D {hook} -j {chain}" for chain in present.jumps.get(hook, [])]
        lines += [f"-I {hook} {place} -j {chain}" for place, chain in enumerate(wanted.jumps.get(hook, []), start=1)]
    # A chain that somebody leads into cannot be deleted; and what has only one place to go cannot outlive it.
    for chain, rules_of_others in present.strays.items():
        lines += [f"-D {chain} {rule}" for rule in rules_of_others if rule not in wanted.strays.get(chain, [])]
    lines += [f"-A {chain} {spec}" for chain, chain_specs in wanted.chains.items() for spec in chain_specs]
    lines += [f"-X {chain}" for chain in stale]
    return "\n".join((*lines, "COMMIT", ""))
