"""How commands print: JSON for scripts, aligned columns for people. stdout is the answer, stderr the talk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


def print_json(document: object) -> None:
    """One indented JSON document."""
    import json  # 3 ms, for the few calls that want it

    print(json.dumps(document, indent=2))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """`rows`, their columns aligned; the first one is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_warnings(warnings: Iterable[str]) -> None:
    """Each as a line on stderr."""
    for warning in warnings:
        print(f"interceptor: warning: {warning}", file=sys.stderr)
