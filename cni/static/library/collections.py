"""The standard library's `collections` for the static file: `abc`, and what is written in C; all else is the original's."""

from __future__ import annotations

import _collections_abc as abc
import sys
from _collections import OrderedDict, defaultdict, deque
from typing import Any

__all__ = ["OrderedDict", "abc", "defaultdict", "deque"]
# As the original does it: a package without a directory.
sys.modules["collections.abc"] = abc


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # the importer asks each module for its __path__
        raise AttributeError(name)
    import original_collections

    return getattr(original_collections, name)
