"""Runs as Markdown. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeAlias

from bench.figures import ByRound, difference, ratio, shown, shown_ratio, spread
from bench.measures import MEASURES, Measure, Metric
from bench.runs import Book
from bench.targets import targets_table

# contender -> key of a value -> its figures
Found: TypeAlias = Mapping[str, Mapping[str, ByRound]]


def markdown(book: Book, *, command: str, machine: Sequence[str], titles: dict[str, str]) -> str:
    """The whole report. `titles`: contender name -> how the table calls it."""
    lines = [
        "# Results",
        "",
        f"Written by `{command}`; do not edit. How to read it, and how it can mislead: [README.md](README.md).",
        "",
        *machine,
        "",
        "Each figure is the median of interleaved runs, in brackets the lowest and the highest; `×` is the median of the",
        "ratios within a round. *System CPU*: the machine's without that of unrelated processes: client, server, kernel and",
        "proxy.",
        "",
    ]
    lines += targets_table(book.runs, titles)
    for section in _distinct(run.section for run in book.runs):
        lines += [f"## {section}", ""]
        for name in _distinct(run.measure for run in book.runs if run.section == section):
            lines += [*_table(book, section, MEASURES[name], titles), ""]
    for title, notes in (
        ("Not measured", [f"{what}: {why}" for what, why in book.left_out.items()]),
        ("Discarded runs", book.discarded),
        (f"Runs while others used more than {book.foreign_limit:g} cores", _noisy(book)),
    ):
        if notes:
            lines += [f"## {title}", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def _table(book: Book, section: str, measure: Measure, titles: dict[str, str]) -> list[str]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in book.runs:
        if (run.section, run.measure) == (section, measure.name):
            for key, value in run.values.items():
                found.setdefault(run.contender, {}).setdefault(key, {})[run.round] = value
    columns = [column for metric in measure.metrics for column in _columns(metric, found, titles)]
    rounds = max(len(of_round) for values in found.values() for of_round in values.values())
    header = ["", *(heading for heading, _ in columns)]
    rows = [[titles[name], *(cell(name) for _, cell in columns)] for name in titles if name in found]
    return [
        f"### {measure.title} ({measure.name}, {rounds} {'round' if rounds == 1 else 'rounds'})",
        "",
        *(f"| {' | '.join(row)} |" for row in (header, ["-"] * len(header), *rows)),
    ]


def _columns(metric: Metric, found: Found, titles: dict[str, str]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """(heading, cell of a contender) of the metric itself and of what it is compared with."""

    def of(name: str) -> ByRound:
        return found[name][metric.key]

    yield metric.title, lambda name: shown(spread(of(name).values()), noise=metric.noise)
    if metric.added and "none" in found:
        yield f"added {metric.title}", lambda name: shown(difference(of(name), of("none")))
    for base in metric.ratios:
        if base in found:
            yield f"{metric.title}: to {titles[base]}", _ratio_cell(of, base)


def _ratio_cell(of: Callable[[str], ByRound], base: str) -> Callable[[str], str]:
    return lambda name: shown_ratio(ratio(of(name), of(base)))


def _noisy(book: Book) -> list[str]:
    """How many runs of each measure were disturbed, and how much."""
    lines = []
    for measure in _distinct(run.measure for run in book.runs):
        every = [run.foreign_cores for run in book.runs if run.measure == measure]
        if disturbed := [cores for cores in every if cores > book.foreign_limit]:
            lines.append(f"{measure}: {len(disturbed)} of {len(every)}, by up to {max(disturbed):.2f} cores")
    return lines


def json_lines(book: Book) -> str:
    """Every run that counts, one JSON document a line."""
    return "".join(json.dumps(asdict(run)) + "\n" for run in book.runs)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
