"""Import python-iptables without the programs that it looks its libraries up with: nine ldconfig, four gcc and eight ld.

ctypes.util.find_library starts them for each name, also for python-iptables' own extension, which they cannot find. The loader
finds a library by its soname; only where that fails is python-iptables left to its own search. And it asks distutils, which
setuptools replaces by all of itself (390 ms), for what sysconfig says, too.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys

from interceptor.backends import libiptc_options

# The version of libxtables is its modules' interface: those that python-iptables 1.2 has structures for, the newest first.
SONAMES = {
    "c": ("libc.so.6",),
    "xtables": ("libxtables.so.12", "libxtables.so.11", "libxtables.so.10"),
    "ip4tc": ("libip4tc.so.2", "libip4tc.so.0"),
    "ip6tc": ("libip6tc.so.2", "libip6tc.so.0"),
}
EXTENSION = "xtwrapper"
MODULES = "XTABLES_LIBDIR"  # of python-iptables and of iptables: where libxtables' modules are
PATHS = "distutils"
_search = ctypes.util.find_library


def load() -> None:
    """Import `iptc`, once. Raises what it raises: ImportError, OSError or AttributeError."""
    if "iptc" in sys.modules:
        return
    ctypes.util.find_library = _find_library
    before = sys.modules.get(PATHS)
    sys.modules[PATHS] = None  # type: ignore[assignment]  # not to be had: as from Python 3.12 on
    try:
        place = _modules()
        if place is not None:
            os.environ.setdefault(MODULES, place)
        import iptc  # noqa: F401

        libiptc_options.read_by_their_size()
    finally:
        del sys.modules[PATHS]
        if before is not None:
            sys.modules[PATHS] = before
        ctypes.util.find_library = _search


def _find_library(name: str) -> str | None:
    if EXTENSION in name:
        return None  # it lies beside the package, and is looked for there next
    for soname in SONAMES.get(name, ()):
        try:
            ctypes.CDLL(soname)
        except OSError:
            continue
        return soname
    return _search(name)


def _modules() -> str | None:
    """The directory beside libxtables that holds its modules."""
    if _find_library("xtables") is None:
        return None
    with open("/proc/self/maps", encoding="utf-8") as maps:
        path = next((line.split(maxsplit=5)[5].strip() for line in maps if "/libxtables.so" in line), "")
    place = os.path.join(os.path.dirname(path), "xtables")
    return place if path and os.path.isdir(place) else None
