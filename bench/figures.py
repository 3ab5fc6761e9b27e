"""Medians, spreads and ratios of interleaved runs. No I/O.

A ratio is made within each round, of runs that followed one another, and the median is taken of these: drift of the machine
between rounds cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Figures of one contender: round -> value.
ByRound = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and its extremes, over `count` rounds."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """The median and extremes; None of nothing."""
    every = sorted(values)
    if not every:
        return None
    return Spread(statistics.median(every), every[0], every[-1], len(every))


def ratio(of: ByRound, to: ByRound) -> Spread | None:
    """`of` divided by `to`, round by round; rounds that one of them lacks, or where `to` is zero, do not count."""
    return spread(of[each] / to[each] for each in of if to.get(each))


def difference(of: ByRound, to: ByRound) -> Spread | None:
    """`of` less `to`, round by round; rounds that one of them lacks do not count."""
    return spread(of[each] - to[each] for each in of if each in to)


def digits(value: float, significant: int = 3) -> str:
    """A figure with so many significant digits, never in exponents: 0.00123, 12.3, 41200."""
    if value == 0:
        return "0"
    decimals = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, significant - 1 - math.floor(math.log10(abs(value))))
    return f"{rounded:,.{decimals}f}"


def shown(found: Spread | None, *, noise: float = 0.0) -> str:
    """`median [low–high]`; a dash for nothing. What is below `noise` is shown as 0."""
    if found is None:
        return "–"
    if found.high <= noise:
        return "0"
    if found.count == 1:
        return digits(found.median)
    return f"{digits(found.median)} [{digits(found.low)}–{digits(found.high)}]"


def shown_ratio(found: Spread | None) -> str:
    """`×0.38`, with its extremes when there is more than one round; a dash for nothing."""
    if found is None:
        return "–"
    if found.count == 1:
        return f"×{found.median:.2f}"
    return f"×{found.median:.2f} [{found.low:.2f}–{found.high:.2f}]"
