"""Flows as a readable table: who, where to, captured by which rule, bytes, time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from interceptor.plan.model import Plan
from interceptor.plan.walk import Fate, Packet, walk
from interceptor.sockets import Address
from interceptor.values import Address as Ip
from interceptor.values import Proto

RIGHT_ALIGNED = frozenset({"SENT", "RECEIVED", "TOOK"})
KIB = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """What a captured packet met: the plan in its namespace, the interface it passed, the namespace's own addresses."""

    plan: Plan
    interface: str
    local: frozenset[Ip] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """What became of a connection, why, and the option behind it."""

    fate: Fate
    why: str
    option: str

    def __str__(self) -> str:
        return f"{self.why} ({self.option})" if self.option else self.why


@dataclass(frozen=True, slots=True)
class Seen:
    """One flow as a person reads it. `flow` is the proxy's own record; None: it went past the proxy. `pod` may be empty."""

    pod: str
    who: str
    direction: str
    destination: Address
    rule: Rule
    flow: Mapping[str, Any] | None = field(default=None, hash=False)

    def as_json(self) -> dict[str, Any]:
        """The proxy's record, with the rule and the pod added."""
        decided = {"fate": self.rule.fate, "rule": self.rule.why, "option": self.rule.option}
        own = {"direction": self.direction, "original_dst": str(self.destination)}
        return {**({"pod": self.pod} if self.pod else {}), **(self.flow or own), **decided}


def decide(place: Place, packet: Packet) -> Rule:
    """The rule that decides about `packet`, by walking the plan."""
    outcome = walk(place.plan, packet)
    if outcome.deciding is None:
        return Rule(outcome.fate, "no rule met it", "")
    return Rule(outcome.fate, outcome.deciding.rule.why, outcome.deciding.rule.option)


def outbound_packet(place: Place, proto: Proto, client: Address, destination: Address, uid: int | None) -> Packet:
    """What a process of the namespace sent."""
    own = destination.ip.is_loopback or destination.ip in place.local
    interface = "lo" if own else place.interface
    return Packet(proto, client.ip, destination.ip, destination.port, uid=uid, out_interface=interface, local=place.local)


def inbound_packet(place: Place, proto: Proto, client: Address, destination: Address) -> Packet:
    """What came in from outside."""
    return Packet(proto, client.ip, destination.ip, destination.port, in_interface=place.interface, local=place.local)


def lines(seen: Iterable[Seen]) -> list[str]:
    """The table, its heading first. A column that says nothing is left out."""
    rows = [_row(one) for one in seen]
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    return [_aligned(row, widths) for row in ({name: name for name in columns}, *rows)] if rows else []


def _aligned(row: Mapping[str, str], widths: Mapping[str, int]) -> str:
    cells = (row[name].rjust(width) if name in RIGHT_ALIGNED else row[name].ljust(width) for name, width in widths.items())
    return "  ".join(cells).rstrip()


def amount(count: int) -> str:
    """`812 B`, `3.4 KiB`, `64.0 MiB`."""
    if count < KIB:
        return f"{count} B"
    size, unit = count / KIB, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < KIB:
            break
        size, unit = size / KIB, larger
    return f"{size:.1f} {unit}"
