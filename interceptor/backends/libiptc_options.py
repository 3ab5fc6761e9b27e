"""Let python-iptables 1.2 find the options of iptables' extensions since 1.8.11, which are listed in larger entries.

libxtables 1.8.11 put a field at the end of struct xt_option_entry (xtables.h) and kept its soname. python-iptables walks the
list by the old size, and finds the first option alone ("owner: no such parameter gid-owner").
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

POINTER = ctypes.sizeof(ctypes.c_void_p)
LOWEST_POINTER = 1 << 16  # nothing is mapped below (vm.mmap_min_addr)


def read_by_their_size() -> None:
    """From now on. Needs `iptc` to be imported already."""
    from iptc import xtables

    known = xtables.xtables
    look_up, check = known._option_lookup, known._options_fcheck  # noqa: SLF001 - no public name leads there
    known._option_lookup = lambda self, listed, name: look_up(self, entries(listed), name)  # noqa: SLF001
    known._options_fcheck = lambda self, name, flags, listed: check(self, name, flags, entries(listed))  # noqa: SLF001


def entries(listed: Any) -> Iterator[Any]:
    """The entries of an extension's list, a pointer to the first, to its end and with it: the entry without a name."""
    layout = listed._type_
    size, at = ctypes.sizeof(layout), ctypes.addressof(listed.contents)
    # Behind the first is the second's name or nothing; in larger entries a small number, the base that a value is read in.
    if ctypes.c_size_t.from_address(at + size).value < LOWEST_POINTER:
        size += POINTER
    while True:
        entry = layout.from_address(at)
        yield entry
        if entry.name is None:
            return
        at += size
