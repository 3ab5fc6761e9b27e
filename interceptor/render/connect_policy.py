"""Render the connect chains of a Plan as a flat policy: facts, and lines of which the first that holds decides. No I/O.

The BPF programs look up once which lists hold a connection's address, port, user and group (facts), then go through the
lines; connect_bytes.py says how both are laid out in their maps.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

from interceptor.errors import Unsupported
from interceptor.plan.model import Chain, ConnectCapture, Goto, Jump, Match, Return, Rewrite, Rule
from interceptor.values import Address, Family, IdRange, Mark, Network, PortRange, Proto, merge

# As in connect.bpf.c
MAX_LINES = 128
MAX_FACTS = 256
FACT_V4, FACT_V6, FACT_MARK, FACT_CGROUP = range(4)
FIRST_LIST = 8


class Does(IntEnum):
    """What a line decides."""

    DIRECT = 1
    TO_PROXY = 2
    GOTO = 3


@dataclass(frozen=True, slots=True)
class Members:
    """One list: addresses of both families, or ports, or ids. Sorted and merged, so that equal lists are equal."""

    networks: tuple[Network, ...] = ()
    ports: tuple[PortRange, ...] = ()
    uids: tuple[IdRange, ...] = ()
    gids: tuple[IdRange, ...] = ()

    def __str__(self) -> str:
        name, values = next(
            (name, values)
            for name, values in (("dst", self.networks), ("dport", self.ports), ("uid", self.uids), ("gid", self.gids))
            if values
        )
        return f"{name} {values[0]}" if len(values) == 1 else f"{name} {{ {', '.join(str(value) for value in values)} }}"


@dataclass(frozen=True, slots=True)
class Line:
    """If all `needs` are facts, then this. `argument` is a port for TO_PROXY and a line's number for GOTO, else 0."""

    needs: tuple[int, ...]
    does: Does
    argument: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """All that the programs decide by. List number n is fact FIRST_LIST + n; `cgroup` the path behind FACT_CGROUP."""

    lists: tuple[Members, ...]
    lines: tuple[Line, ...]
    mark: Mark | None = None
    cgroup: str | None = None
    source: Address | None = None


def compile_policy(capture: ConnectCapture) -> tuple[Policy, tuple[str, ...]]:
    """The policy, and for each of its lines why it is there. Raises Unsupported for more than the programs can hold."""
    compiler = _Compiler(capture)
    compiler.flatten()
    policy = Policy(tuple(compiler.lists), tuple(compiler.lines), compiler.mark, compiler.cgroup, capture.source)
    if len(policy.lines) > MAX_LINES or FIRST_LIST + len(policy.lists) > MAX_FACTS:
        raise Unsupported(
            f"--outbound connect: {len(policy.lines)} rules with {len(policy.lists)} different lists; "
            f"at most {MAX_LINES} and {MAX_FACTS - FIRST_LIST}: join --exclude-outbound-for-uids rules that name the same ports"
        )
    return policy, tuple(compiler.whys)


class _Compiler:
    """Collects lists and lines; chains are laid out one after the other, and a Goto leads forward."""

    def __init__(self, capture: ConnectCapture) -> None:
        self.capture = capture
        self.lists: dict[Members, int] = {}
        self.lines: list[Line] = []
        self.whys: list[str] = []
        self.mark: Mark | None = None
        self.cgroup: str | None = None
        self._chains = {chain.name: chain for chain in capture.chains}

    def flatten(self) -> None:
        laid_out = [chain for chain in self.capture.chains if chain.hook is not None or _only(chain) is None]
        starts: dict[str, int] = {}
        position = 0
        for chain in laid_out:
            starts[chain.name] = position
            position += sum(len(_owners(rule.match)) for rule in chain.rules) + (not _decides_all(chain))
        for chain in laid_out:
            for rule in chain.rules:
                for owner in _owners(rule.match):
                    self._add(rule, owner, starts)
            if not _decides_all(chain):
                self.lines.append(Line((), Does.DIRECT))
                self.whys.append("nothing above captures it")

    def _add(self, rule: Rule, owner: Match, starts: Mapping[str, int]) -> None:
        does, argument = self._verdict(rule, starts)
        assert does is not Does.GOTO or argument > len(self.lines), "a Goto leads back"
        self.lines.append(Line(tuple(sorted(self._needs(rule.match, owner))), does, argument))
        self.whys.append(rule.why)

    def _verdict(self, rule: Rule, starts: Mapping[str, int]) -> tuple[Does, int]:
        match rule.verdict:
            case Return():
                return Does.DIRECT, 0
            case Rewrite(port):
                return Does.TO_PROXY, port
            case Goto(name) | Jump(name):
                # The hook's chain ends with its one Jump for a family: it never needs to come back.
                only = _only(self._chains[name])
                return (Does.GOTO, starts[name]) if only is None else self._verdict(only, starts)
        raise AssertionError(f"{rule.verdict} is not decided when a socket is connected")

    def _needs(self, match: Match, owner: Match) -> Iterator[int]:
        if match.family is not None:
            yield FACT_V4 if match.family is Family.V4 else FACT_V6
        if match.mark is not None:
            self.mark = match.mark
            yield FACT_MARK
        if match.cgroup is not None:
            self.cgroup = match.cgroup
            yield FACT_CGROUP
        if match.dst_is_local:
            yield self._list(Members(networks=collapsed(self.capture.own)))
        if match.dst:
            yield self._list(Members(networks=collapsed(match.dst)))
        if match.dports:
            yield self._list(Members(ports=merge(match.dports)))
        if owner.uids or owner.gids:
            yield self._list(Members(uids=merge(owner.uids), gids=merge(owner.gids)))

    def _list(self, members: Members) -> int:
        return FIRST_LIST + self.lists.setdefault(members, len(self.lists))


def _decides_all(chain: Chain) -> bool:
    """Whether nothing comes to the end of a chain."""
    return bool(chain.rules) and chain.rules[-1].match in (Match(), Match(proto=Proto.TCP))


def _only(chain: Chain) -> Rule | None:
    """The one rule of a chain that decides about everything that comes to it; None when it asks more."""
    return chain.rules[0] if len(chain.rules) == 1 and _decides_all(chain) else None


def _owners(match: Match) -> tuple[Match, ...]:
    # Users and groups are alternatives, as in every renderer: a line each.
    if match.uids and match.gids:
        return Match(uids=match.uids), Match(gids=match.gids)
    return (Match(uids=match.uids, gids=match.gids),)


def collapsed(networks: Iterable[Network]) -> tuple[Network, ...]:
    """Sorted, without overlaps, IPv4 first."""
    members = tuple(networks)
    return tuple(
        network
        for family in Family
        for network in ipaddress.collapse_addresses(item for item in members if Family.of(item) is family)  # type: ignore[type-var]
    )


def document(capture: ConnectCapture) -> str:
    """The whole of `capture` for people: whose connections, and each line with its reason."""
    policy, whys = compile_policy(capture)
    whose = {None: "processes of a cgroup that is not given yet", "/": "all processes of this network namespace"}
    title = whose.get(capture.cgroup, f"processes of cgroup {capture.cgroup} in this network namespace")
    whys = (*whys, "what a captured IPv4 connection comes from, unless its socket is bound; IPv6: ::1")
    lines = (f"  {text}    ({why})" for text, why in zip(texts(policy), whys, strict=True))
    return "\n".join((f"TCP connections of {title}, when they are made; the first line that holds decides:", *lines, ""))


def texts(policy: Policy) -> tuple[str, ...]:
    """The lines as an operator reads them. Those of a policy that was read back hold a cgroup's number for its path."""
    lines = tuple(f"{number}: {_conditions(policy, line)} -> {_target(line)}" for number, line in enumerate(policy.lines))
    return (*lines, f"from {policy.source or 'loopback'}")


def _conditions(policy: Policy, line: Line) -> str:
    named = {
        FACT_V4: "IPv4",
        FACT_V6: "IPv6",
        FACT_MARK: f"mark {policy.mark}",
        FACT_CGROUP: f"cgroup {policy.cgroup}",
    }
    parts = [named[fact] if fact in named else str(policy.lists[fact - FIRST_LIST]) for fact in line.needs]
    return ", ".join(parts) or "any"


def _target(line: Line) -> str:
    match line.does:
        case Does.DIRECT:
            return "direct"
        case Does.TO_PROXY:
            return f"to the proxy's port {line.argument}"
        case Does.GOTO:
            return f"go on at {line.argument}"
