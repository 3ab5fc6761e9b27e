"""Compile the patterns of modules while the static file is built, for library/re.py.

The modules are imported; none of their functions is run.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of 3.11, by which this is run; no stub has them.
_parser: Any = importlib.import_module("re._parser")
_compiler: Any = importlib.import_module("re._compiler")
# Function of `re` -> where its flags are, the pattern being first.
FLAGS_AT = {"compile": 1, "match": 2, "search": 2, "fullmatch": 2, "findall": 2, "finditer": 2, "sub": 4}


def module(files: dict[str, Path]) -> str:
    """The source of compiled_patterns: PATTERNS, (pattern, flags) -> what _sre.compile is given after the pattern."""
    found = {}
    for name, path in files.items():
        for pattern, flags in of_module(name, path):
            found[pattern, flags] = compiled(pattern, flags)
    return f"PATTERNS = {found!r}\n"


def of_module(name: str, path: Path) -> Iterator[tuple[str | bytes, int]]:
    """Each pattern, with its flags, that the module gives to `re` and that is known without running its functions."""
    known = vars(importlib.import_module(name))
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        place = FLAGS_AT.get(node.func.attr)
        if place is None or not isinstance(node.func.value, ast.Name) or node.func.value.id != "re":
            continue
        flags = [*node.args[place : place + 1], *(each.value for each in node.keywords if each.arg == "flags")]
        try:
            pattern, *values = (_value(each, known) for each in (node.args[0], *flags))
        except NameError:
            continue  # a variable of a function's
        if isinstance(pattern, str | bytes):
            yield pattern, sum(int(each) for each in values)


def compiled(pattern: str | bytes, flags: int) -> tuple[object, ...]:
    """What `re` gives to _sre.compile after the pattern."""
    parsed = _parser.parse(pattern, flags)
    names = parsed.state.groupdict
    by_number: list[str | None] = [None] * parsed.state.groups
    for each, number in names.items():
        by_number[number] = each
    # `re`'s own compile() keeps nothing of what it gives to _sre.
    code = [int(each) for each in _compiler._code(parsed, flags)]  # noqa: SLF001
    return flags | parsed.state.flags, code, parsed.state.groups - 1, names, tuple(by_number)


def _value(expression: ast.expr, known: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(expression), "pattern", "eval"), known)  # noqa: S307 - of our own source
