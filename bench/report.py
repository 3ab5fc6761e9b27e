"""Runs as Markdown. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from bench.figures import ByRound, ratio, shown, shown_ratio, spread
from bench.measures import MEASURES, Measure
from bench.runs import Book

# Ratios are given to these, where they were measured.
BASES = ("none", "envoy")


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
    for path in _distinct(run.path for run in book.runs):
        lines += [f"## {path}", ""]
        for name in _distinct(run.measure for run in book.runs if run.path == path):
            lines += [*_table(book, path, MEASURES[name], titles), ""]
    for title, notes in (
        ("Not measured", [f"{what}: {why}" for what, why in book.left_out.items()]),
        ("Discarded runs", book.discarded),
        ("Runs while others used the machine", book.noisy),
    ):
        if notes:
            lines += [f"## {title}", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def _table(book: Book, path: str, measure: Measure, titles: dict[str, str]) -> list[str]:
    found: dict[str, dict[str, ByRound]] = {}
    for run in book.runs:
        if (run.path, run.measure) == (path, measure.name):
            for key, value in run.values.items():
                found.setdefault(run.contender, {}).setdefault(key, {})[run.round] = value  # type: ignore[index]
    main = measure.metrics[0]
    bases = [base for base in BASES if base in found]
    rounds = max(len(rows[main.key]) for rows in found.values())
    header = ["", *(metric.title for metric in measure.metrics), *(f"{main.title}: to {titles[base]}" for base in bases)]
    rows = [
        [
            titles[name],
            *(shown(spread(values[metric.key].values()), noise=metric.noise) for metric in measure.metrics),
            *(shown_ratio(ratio(values[main.key], found[base][main.key])) for base in bases),
        ]
        for name, values in sorted(found.items(), key=lambda item: list(titles).index(item[0]))
    ]
    return [
        f"### {measure.title} ({measure.name}, {rounds} {'round' if rounds == 1 else 'rounds'})",
        "",
        *(f"| {' | '.join(row)} |" for row in (header, ["-"] * len(header), *rows)),
    ]


def json_lines(book: Book) -> str:
    """Every run that counts, one JSON document a line."""
    return "".join(json.dumps(asdict(run)) + "\n" for run in book.runs)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
