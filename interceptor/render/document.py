"""Render a Plan as plain data for JSON. No I/O. The form is documented in docs/plan-json.md and stable within a `schema`.

A match holds the given conditions alone; lists are texts as the options take them.
"""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
from typing import Any

from interceptor.plan.model import Chain, Match, Plan, Rule, Verdict

SCHEMA = 1


def plan(whole: Plan) -> dict[str, Any]:
    """All of the plan."""
    return {
        "schema": SCHEMA,
        "families": _plain(whole.families),
        "chains": [_chain(chain) for chain in whole.all_chains],
        "routes": [{"family": route.family.value, "mark": str(route.mark), "table": route.table} for route in whole.routes],
        "inbound_source_v6": whole.inbound_source_v6,
        "connect": {"cgroup": whole.connect.cgroup, "own": _plain(whole.connect.own), "source": _plain(whole.connect.source)}
        if whole.connect
        else None,
    }


def _chain(chain: Chain) -> dict[str, Any]:
    hook = chain.hook.value if chain.hook is not None else None
    return {"table": chain.table.value, "name": chain.name, "hook": hook, "rules": [rule(item) for item in chain.rules]}


def rule(item: Rule) -> dict[str, Any]:
    """One rule."""
    return {"match": _match(item.match), "verdict": verdict(item.verdict), "why": item.why, "option": item.option}


def _match(match: Match) -> dict[str, Any]:
    given = {condition.name: getattr(match, condition.name) for condition in dataclasses.fields(match)}
    return {name: _plain(value) for name, value in given.items() if value != getattr(Match(), name)}


def verdict(item: Verdict) -> dict[str, Any]:
    """`kind` is the verdict's name with dashes (set-mark); the other keys are what it carries."""
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(item).__name__).lower()
    return {"kind": kind} | {carried.name: _plain(getattr(item, carried.name)) for carried in dataclasses.fields(item)}


def _plain(value: object) -> Any:
    if isinstance(value, tuple):
        return [_plain(member) for member in value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, bool | int | str | None) else str(value)
