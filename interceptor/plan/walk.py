"""walk: follow the first packet of a connection through a Plan, as the kernel would. Pure.

`explain` and the property tests use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, assert_never

from interceptor.plan.model import (
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
    Tproxy,
    Zone,
)
from interceptor.values import Address, Family, Network, Proto, contains

Fate: TypeAlias = Literal["captured", "direct", "dropped"]


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection. `in_interface` is None for what a local process sends.

    `local` are the namespace's own addresses. `uid` and `gid` None: no local process owns it. `announced`: whether the proxy
    has announced itself by then.
    """

    proto: Proto
    src: Address
    dst: Address
    dport: int
    uid: int | None = None
    gid: int | None = None
    in_interface: str | None = None
    out_interface: str | None = None
    mark: int = 0
    connmark: int = 0
    cgroup: str | None = None
    local: frozenset[Address] = frozenset()
    announced: bool = True

    def is_local(self, address: Address) -> bool:
        """Whether `address` is this namespace's own."""
        return address.is_loopback or address in self.local


@dataclass(frozen=True, slots=True)
class Step:
    """A rule that matched, and where it stands."""

    chain: Chain
    rule: Rule


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a packet. `port` is the proxy's, when captured. `steps` are all rules that matched, in order."""

    fate: Fate
    port: int | None = None
    mechanism: Literal["redirect", "tproxy", "connect"] | None = None
    steps: tuple[Step, ...] = ()

    @property
    def deciding(self) -> Step | None:
        """The rule that decided; None when no rule of the plan was met."""
        # RAW and TIMEOUT say how conntrack sees the packet, not where it goes.
        deciding = [
            step
            for step in self.steps
            if isinstance(step.rule.verdict, Announce)
            or (isinstance(step.rule.verdict, Return | Goto | Drop) and step.chain.table not in (Table.RAW, Table.TIMEOUT))
        ]
        if self.fate == "direct":
            return deciding[-1] if deciding else None
        # The rule that sent the packet to where it was captured says more than the last one that let it pass before.
        return next((step for step in reversed(deciding) if not isinstance(step.rule.verdict, Return)), None)


@dataclass(slots=True)
class _Walk:
    plan: Plan
    packet: Packet
    steps: list[Step] = field(default_factory=list)
    outcome: Outcome | None = None

    def hook(self, hook: Hook, tables: tuple[Table, ...]) -> None:
        for table in tables:
            for chain in self.plan.all_chains:
                if self.outcome is None and chain.hook is hook and chain.table is table:
                    self.run(chain)

    def run(self, chain: Chain) -> None:
        for rule in chain.rules:
            if not matches(rule.match, self.packet):
                continue
            self.steps.append(Step(chain, rule))
            if self.take(chain, rule) or self.outcome is not None:
                return

    def take(self, chain: Chain, rule: Rule) -> bool:
        """Carry out the verdict; True when the chain is left."""
        verdict = rule.verdict
        match verdict:
            case Return():
                return True
            case Jump(name) | Goto(name):
                self.run(self.find(chain.table, name))
                return isinstance(verdict, Goto)
            case Drop() | Announce():
                self.outcome = Outcome("dropped")
            case Redirect(port):
                self.outcome = Outcome("captured", port, "redirect")
            case Rewrite(port):
                self.outcome = Outcome("captured", port, "connect")
            case Tproxy(port):
                self.outcome = Outcome("captured", port, "tproxy")
            case SetMark(mark):
                self.packet = replace(self.packet, mark=mark.put(self.packet.mark))
            case SetConnmark(mark):
                self.packet = replace(self.packet, connmark=mark.put(self.packet.connmark))
            case Zone() | ShortTimeouts() | Log():
                pass
            case _:
                assert_never(verdict)
        return False

    def find(self, table: Table, name: str) -> Chain:
        return next(chain for chain in self.plan.all_chains if (chain.table, chain.name) == (table, name))


def walk(plan: Plan, packet: Packet) -> Outcome:
    """What becomes of `packet` under `plan`, and by which rules."""
    going = _Walk(plan, packet)
    if packet.in_interface is not None:
        going.hook(Hook.PREROUTING, tuple(Table))
    else:
        going.hook(Hook.CONNECT, (Table.CONNECT,))
        going.hook(Hook.OUTPUT, tuple(Table))
        if going.outcome is None and (packet.out_interface == "lo" or _is_routed_back(plan, going.packet)):
            # NAT was decided in OUTPUT; what loops through lo meets PREROUTING's other tables.
            going.packet = replace(going.packet, in_interface="lo")
            going.hook(Hook.PREROUTING, (Table.RAW, Table.TIMEOUT, Table.MANGLE))
    return replace(going.outcome or Outcome("direct"), steps=tuple(going.steps))


def _is_routed_back(plan: Plan, packet: Packet) -> bool:
    family = Family.of(packet.dst)
    return any(route.family is family and route.mark.matches(packet.mark) for route in plan.routes)


def matches(match: Match, packet: Packet) -> bool:
    """Whether `packet` meets every condition of `match`."""
    return all(_conditions(match, packet))


def _conditions(match: Match, packet: Packet) -> Iterator[bool]:
    yield match.family in (None, Family.of(packet.dst))
    yield match.proto in (None, packet.proto)
    yield not match.syn or packet.proto is Proto.TCP
    yield match.in_interface in (None, packet.in_interface)
    yield match.out_interface in (None, packet.out_interface)
    yield _within(match.src, packet.src)
    yield _within(match.dst, packet.dst)
    yield match.src_is_local in (None, packet.is_local(packet.src))
    yield match.dst_is_local in (None, packet.is_local(packet.dst))
    yield not match.dports or contains(match.dports, packet.dport)
    yield _owned(match, packet)
    yield match.mark is None or match.mark.matches(packet.mark)
    yield match.connmark is None or match.connmark.matches(packet.connmark)
    yield match.cgroup is None or match.cgroup == packet.cgroup
    yield not match.invalid
    yield match.direction in (None, Direction.ORIGINAL)
    yield match.announced in (None, packet.announced)


def _owned(match: Match, packet: Packet) -> bool:
    # Users and groups are alternatives, as the renderers write them.
    by_user = packet.uid is not None and contains(match.uids, packet.uid)
    by_group = packet.gid is not None and contains(match.gids, packet.gid)
    return by_user or by_group or not (match.uids or match.gids)


def _within(networks: tuple[Network, ...], address: Address) -> bool:
    return not networks or any(address.version == network.version and address in network for network in networks)
