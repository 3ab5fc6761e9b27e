"""Flows as a readable table, or as JSON lines: who, where to, captured by which rule, bytes, time. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from interceptor.plan.model import Plan
from interceptor.plan.walk import Packet, walk
from interceptor.proxy.flows import Flow
from interceptor.values import Address, Proto

HEADINGS = ("TIME", "POD", "WHO", "DIRECTION", "DESTINATION", "CAPTURED BY", "SENT", "RECEIVED", "TOOK", "END")
RIGHT = {"SENT", "RECEIVED", "TOOK"}


@dataclass(frozen=True, slots=True)
class Place:
    """What a captured packet met: the plan in its namespace, the interface it went through, the namespace's own addresses."""

    plan: Plan
    interface: str
    local: frozenset[Address] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """What became of a connection, why, and the option behind it."""

    fate: Literal["captured", "direct", "dropped"]
    why: str
    option: str

    def __str__(self) -> str:
        return f"{self.why} ({self.option})" if self.option else self.why


def rule_of(flow: Flow, place: Place) -> Rule:
    """The rule that decided about `flow`, by walking the plan with its first packet."""
    arriving = flow.direction == "inbound"
    packet = Packet(
        Proto(flow.proto),
        flow.client.ip,
        flow.original_dst.ip,
        flow.original_dst.port,
        uid=None if arriving else flow.uid,
        in_interface=place.interface if arriving else None,
        out_interface=None if arriving else place.interface,
        local=place.local,
    )
    outcome = walk(place.plan, packet)
    if outcome.deciding is None:
        return Rule(outcome.fate, "no rule met it", "")
    return Rule(outcome.fate, outcome.deciding.rule.why, outcome.deciding.rule.option)
