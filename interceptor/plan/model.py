"""Plan, Chain, Rule, Match and the verdicts. Frozen, compared by value, closed. No text of any backend.

A rule may become several kernel rules (one per address, per fifteen ports): it matches if any of its alternatives does, so
lists in a Match are never negated. Rules are evaluated on every packet of a connection in RAW, TIMEOUT and MANGLE, and on
its first packet in NAT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from interceptor.values import Address, Family, IdRange, Mark, Network, PortRange, Proto


class Table(Enum):
    """Where a chain is evaluated, in the order in which a packet meets them.

    TIMEOUT is iptables' raw table (CT targets work on the template) and, in nft, a chain after conntrack (where
    `ct timeout set` needs the entry to exist): one concern, two places.
    """

    RAW = "raw"
    TIMEOUT = "timeout"
    MANGLE = "mangle"
    NAT = "nat"
    CONNECT = "connect"  # no netfilter table: when a socket is connected, before there is a packet


class Hook(Enum):
    """Where in the kernel's packet flow a chain is entered."""

    PREROUTING = "PREROUTING"
    OUTPUT = "OUTPUT"
    CONNECT = "CONNECT"


class TimeoutPolicy(Enum):
    """Whose TIMEOUTS; the value begins the policy's name in the kernel."""

    UNCAPTURED = "itu"  # because of who sends it, so that another's to the same destination may be captured
    CAPTURED = "itc"  # or to be left alone whoever sends it


class Direction(Enum):
    """Of a packet within its connection, as conntrack sees it."""

    ORIGINAL = "original"
    REPLY = "reply"


@dataclass(frozen=True, slots=True)
class Match:
    """All given conditions must hold; an empty tuple or None is no condition."""

    family: Family | None = None
    proto: Proto | None = None
    syn: bool = False  # TCP's first packet: SYN without FIN, RST, ACK
    in_interface: str | None = None
    out_interface: str | None = None
    src: tuple[Network, ...] = ()
    dst: tuple[Network, ...] = ()
    src_is_local: bool | None = None  # an address of this namespace, by the routing table
    dst_is_local: bool | None = None
    dports: tuple[PortRange, ...] = ()
    uids: tuple[IdRange, ...] = ()
    gids: tuple[IdRange, ...] = ()
    mark: Mark | None = None
    connmark: Mark | None = None
    cgroup: str | None = None
    invalid: bool = False  # conntrack state INVALID
    direction: Direction | None = None
    untranslated: bool = False  # no NAT changes the connection's destination
    announced: bool | None = None  # the proxy has announced itself since the rules came; or not yet


@dataclass(frozen=True, slots=True)
class Return:
    """Leave this chain; at the end of a hook's chain the packet goes on uncaptured."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Discard the packet."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """To this port of this host, by NAT. The original destination stays with conntrack."""

    port: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """To this port of this host: the connecting socket is given another address. The original one stays in a BPF map."""

    port: int


@dataclass(frozen=True, slots=True)
class Tproxy:
    """To the transparent socket on this port, unchanged; the mark makes routing deliver it here."""

    port: int
    mark: Mark


@dataclass(frozen=True, slots=True)
class Announce:
    """The proxy says that it is ready: note it, for rules that ask, and discard the datagram."""


@dataclass(frozen=True, slots=True)
class SetMark:
    """Mark the packet, and look its route up again."""

    mark: Mark


@dataclass(frozen=True, slots=True)
class SetConnmark:
    """Mark the connection; with value 0 the mask's bits are cleared."""

    mark: Mark


@dataclass(frozen=True, slots=True)
class Zone:
    """Look the packet's connection up in a conntrack zone, in the original direction only.

    The reply direction stays in the default zone, so no rule has to recognise replies.
    """

    number: int


@dataclass(frozen=True, slots=True)
class ShortTimeouts:
    """Give the new connection the timeouts of TIMEOUTS, see there."""

    policy: TimeoutPolicy


@dataclass(frozen=True, slots=True)
class Log:
    """Write the packet to the kernel's log and go on."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Jump:
    """Go on in that chain; come back when it returns."""

    chain: str


@dataclass(frozen=True, slots=True)
class Goto:
    """Go on in that chain; when it returns, so does this one."""

    chain: str


Verdict: TypeAlias = (
    Return | Drop | Redirect | Rewrite | Tproxy | Announce | SetMark | SetConnmark | Zone | ShortTimeouts | Log | Jump | Goto
)  # fmt: skip

# Verdicts after which the packet goes to no further rule of this chain.
TERMINAL = (Return, Drop, Redirect, Rewrite, Tproxy, Announce, Goto)

# Seconds, by conntrack state, for TCP that leaves this namespace. conntrack keeps the entry of a connection that was reset
# for 10 s, and a SYN from the same port reopens it with whatever NAT was decided then: after the proxy's own connection an
# application goes around the proxy, after an application's the proxy is led back into itself. With 0 the entry is gone at once.
# 60 s in FIN_WAIT is the kernel's own net.ipv4.tcp_fin_timeout, after which the port can be used again (conntrack: 120); not
# for captured connections, which need their NAT as long as they live. docs/decisions/0002-conntrack-bypass.md.
TIMEOUTS: dict[TimeoutPolicy, dict[str, int]] = {
    TimeoutPolicy.UNCAPTURED: {"fin_wait": 60, "close": 0},
    TimeoutPolicy.CAPTURED: {"close": 0},
}


def timeout_name(policy: TimeoutPolicy, family: Family) -> str:
    """The policy's name in the kernel: four characters, as many as the kernel gives iptables-save back."""
    return policy.value + family.value[1]


@dataclass(frozen=True, slots=True)
class Rule:
    """One decision. `why` becomes the rule's comment in the kernel; `option` is the flag behind it."""

    match: Match
    verdict: Verdict
    why: str
    option: str


@dataclass(frozen=True, slots=True)
class Chain:
    """Rules in order. `hook` is set for the chains that the kernel enters by itself; the others are jumped to."""

    table: Table
    name: str
    rules: tuple[Rule, ...]
    hook: Hook | None = None


@dataclass(frozen=True, slots=True)
class ConnectionMarks:
    """What a TPROXY'd connection is; the values follow `--tproxy-mark`, under its mask."""

    outbound: Mark  # captured on its way out: its packets are sent round through lo
    inbound: Mark  # captured on its way in; at the proxy's SYN to its own pod: to be decided as one that comes in
    original_source: Mark  # the proxy to the application, from the client's address: replies come back through lo
    none: Mark

    @classmethod
    def of(cls, mark: Mark) -> ConnectionMarks:
        outbound, inbound, original_source = (Mark(mark.value + step, mark.mask) for step in range(3))
        return cls(outbound, inbound, original_source, none=Mark(0, mark.mask))


@dataclass(frozen=True, slots=True)
class PolicyRoute:
    """`ip rule fwmark MARK lookup TABLE` and a default route there that delivers everything locally."""

    family: Family
    mark: Mark
    table: int

    def __str__(self) -> str:
        return f"IP{self.family.value}: fwmark {self.mark} lookup {self.table}"


@dataclass(frozen=True, slots=True)
class ConnectCapture:
    """Capture of TCP when it is connected, in place of outbound rules. All chains are of Table.CONNECT.

    `cgroup` is whose processes are captured: a cgroup v2 path, "/" for all; None when nobody has said so yet. `own` are
    what `dst_is_local` means: a connecting socket has no route to ask.
    """

    chains: tuple[Chain, ...]
    cgroup: str | None
    own: tuple[Network, ...]
    source: Address | None = None  # what captured IPv4 connections come from, as without capture


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the kernel should hold for one Config on one host."""

    families: tuple[Family, ...]
    chains: tuple[Chain, ...]
    routes: tuple[PolicyRoute, ...] = ()
    inbound_source_v6: bool = False  # ::6/128 on lo, the source of the proxy's inbound leg
    connect: ConnectCapture | None = None
    # A state, not a rule: whether it begins as if the proxy had announced itself, because it has, under earlier rules.
    announced: bool = field(default=False, compare=False)

    @property
    def waiting(self) -> frozenset[Family]:
        """The families with rules that ask whether the proxy has announced itself: it is to do so in each."""
        heard = [rule.match for chain in self.chains for rule in chain.rules if isinstance(rule.verdict, Announce)]
        return frozenset(family for family in Family if any(match.family in (None, family) for match in heard))

    @property
    def all_chains(self) -> tuple[Chain, ...]:
        """Those that become rules, and those of what is decided at connect()."""
        return self.chains + (self.connect.chains if self.connect is not None else ())

    @property
    def timeout_policies(self) -> tuple[TimeoutPolicy, ...]:
        """The conntrack timeout policies that some rule names."""
        named = {
            rule.verdict.policy for chain in self.chains for rule in chain.rules if isinstance(rule.verdict, ShortTimeouts)
        }
        return tuple(policy for policy in TimeoutPolicy if policy in named)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a plan depends on besides its Config; facts.py looks it up."""

    kernel_families: tuple[Family, ...] = (Family.V4, Family.V6)
    resolvers: tuple[Network, ...] = ()  # host networks, in resolv.conf's order
    loopback_has_v6: bool = True  # lo may be given ::6
    own_addresses: tuple[Network, ...] = ()  # of this namespace, loopback's left out
    source: Address | None = None  # what IPv4 connections to elsewhere come from
    pod_cgroup: str | None = None  # of the process that the namespace was named by
    # Ours, that stand: connections that TPROXY captured under them may be open, see plan/established.py.
    earlier_routes: tuple[PolicyRoute, ...] = ()
