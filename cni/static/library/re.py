"""The standard library's `re` for the static file: its patterns were compiled when the file was built.

`compiled_patterns` (patterns.py) has those that modules of ours, and `json`, compile. Any other pattern, and whatever else is
asked for, is the original's business: importing it and compiling one pattern takes as long as twenty of our modules.
"""

from __future__ import annotations

import _sre
from functools import cache
from typing import Any

from compiled_patterns import PATTERNS

# sre_constants.h
A = ASCII = 256
I = IGNORECASE = 2  # noqa: E741 - the original's name
M = MULTILINE = 8
S = DOTALL = 16
U = UNICODE = 32
X = VERBOSE = 64


@cache
def compile(pattern: Any, flags: int = 0) -> Any:  # noqa: A001 - the original's name
    """As the original."""
    known = PATTERNS.get((pattern, flags))
    if known is None:
        import original_re

        return original_re.compile(pattern, flags)
    seen, code, groups, names, by_number = known
    return _sre.compile(pattern, seen, code, groups, names, by_number)


def fullmatch(pattern: Any, text: Any, flags: int = 0) -> Any:
    """As the original."""
    return compile(pattern, flags).fullmatch(text)


def match(pattern: Any, text: Any, flags: int = 0) -> Any:
    """As the original."""
    return compile(pattern, flags).match(text)


def search(pattern: Any, text: Any, flags: int = 0) -> Any:
    """As the original."""
    return compile(pattern, flags).search(text)


def sub(pattern: Any, instead: Any, text: Any, count: int = 0, flags: int = 0) -> Any:
    """As the original."""
    return compile(pattern, flags).sub(instead, text, count)


def findall(pattern: Any, text: Any, flags: int = 0) -> Any:
    """As the original."""
    return compile(pattern, flags).findall(text)


def finditer(pattern: Any, text: Any, flags: int = 0) -> Any:
    """As the original."""
    return compile(pattern, flags).finditer(text)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # the importer asks each module for its __path__
        raise AttributeError(name)
    import original_re

    return getattr(original_re, name)
