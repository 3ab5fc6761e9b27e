"""What the product is to reach: one table, and how a set of runs stands to it. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from bench.figures import Spread, difference, digits, ratio, spread
from bench.runs import Run

# Where the targets were set: one worker, outbound, IPv4.
SECTION = "outbound-v4"


@dataclass(frozen=True, slots=True)
class Target:
    """`contender`'s figure, alone or compared with that of `base` within a round, is to be `sense` `bound`."""

    what: str
    contender: str
    measure: str
    key: str
    base: str | None
    sense: Literal["at least", "at most"]
    bound: float
    compared: Literal["ratio", "difference"] = "ratio"


TARGETS = (
    Target("bulk, 1 stream, × Envoy", "splice", "bulk1", "gbps", "envoy", "at least", 1.05),
    Target("bulk, 8 streams, × Envoy", "splice", "bulk8", "gbps", "envoy", "at least", 1.4),
    Target("proxy CPU per GB, 1 stream, × Envoy", "splice", "bulk1", "proxy_s", "envoy", "at most", 0.65),
    Target("proxy CPU per GB, 8 streams, × Envoy", "splice", "bulk8", "proxy_s", "envoy", "at most", 0.65),
    Target("requests/s, × Envoy", "splice", "rr", "rate", "envoy", "at least", 1.0),
    Target("p99 of requests, × Envoy (workers pinned)", "splice", "rr", "p99_us", "envoy", "at most", 1.0),
    Target("p50 unloaded, × Envoy", "splice", "latency", "p50_us", "envoy", "at most", 1.0),
    Target("new connections/s, × Envoy", "splice", "conn", "rate", "envoy", "at least", 1.25),
    Target("new connections/s, × HAProxy", "splice", "conn", "rate", "haproxy", "at least", 0.95),
    Target("memory of an idle connection, KB", "splice", "idle", "pss_kb", None, "at most", 1.5),
    Target("bulk, 1 stream, × no proxy", "packet", "bulk1", "gbps", "none", "at least", 0.9),
    Target("bulk, 8 streams, × no proxy", "packet", "bulk8", "gbps", "none", "at least", 0.9),
    Target("proxy CPU per GB, 1 stream, × Envoy", "packet", "bulk1", "proxy_s", "envoy", "at most", 0.02),
    Target("requests/s, × Envoy", "packet", "rr", "rate", "envoy", "at least", 2.2),
    Target("requests/s, × no proxy", "packet", "rr", "rate", "none", "at least", 0.85),
    Target("p50 unloaded, µs more than no proxy", "packet", "latency", "p50_us", "none", "at most", 15, "difference"),
    Target("new connections/s, × Envoy", "packet", "conn", "rate", "envoy", "at least", 1.15),
    Target("memory of an idle connection, KB", "packet", "idle", "pss_kb", None, "at most", 1.0),
)  # fmt: skip


def targets_table(runs: Iterable[Run], titles: dict[str, str]) -> list[str]:
    """Lines of Markdown, none when nothing was measured that has a target. The median decides; the spread stands beside it."""
    here = [run for run in runs if run.section == SECTION]
    rows = [*_rows(here, titles)]
    if not rows:
        return []
    head = ["## Against the targets", "", "| | measure | target | measured | |", "| - | - | - | - | - |"]
    return [*head, *rows, ""]


def _rows(runs: list[Run], titles: dict[str, str]) -> Iterator[str]:
    for each in TARGETS:
        found = _found(runs, each)
        if found is not None:
            verdict = "reached" if is_reached(each, found) else "**missed**"
            measured = f"{digits(found.median)} [{digits(found.low)}–{digits(found.high)}]"
            sign = "≥" if each.sense == "at least" else "≤"
            yield f"| {titles[each.contender]} | {each.what} | {sign} {each.bound:g} | {measured} | {verdict} |"


def is_reached(target: Target, found: Spread) -> bool:
    """Whether the median is on the right side."""
    return found.median >= target.bound if target.sense == "at least" else found.median <= target.bound


def _found(runs: list[Run], target: Target) -> Spread | None:
    def of(contender: str) -> dict[int, float]:
        return {
            run.round: run.values[target.key]
            for run in runs
            if (run.contender, run.measure) == (contender, target.measure) and target.key in run.values
        }

    if target.base is None:
        return spread(of(target.contender).values())
    compare = ratio if target.compared == "ratio" else difference
    return compare(of(target.contender), of(target.base))
