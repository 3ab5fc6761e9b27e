"""The options of an extension are walked by the size that its libxtables has, whichever that is."""

from __future__ import annotations

import ctypes

import pytest

from interceptor.backends.libiptc_options import entries

FIELDS = (
    ("name", ctypes.c_char_p),
    ("numbers", ctypes.c_uint * 6),
    ("size", ctypes.c_size_t),
    ("min", ctypes.c_uint),
    ("max", ctypes.c_uint),
)


class Known(ctypes.Structure):
    """struct xt_option_entry until 1.8.10, as python-iptables has it."""

    _fields_ = FIELDS


class Larger(ctypes.Structure):
    """The same since 1.8.11."""

    _fields_ = (*FIELDS, ("base", ctypes.c_uint))


@pytest.mark.parametrize("base", [0, 10])
@pytest.mark.parametrize("layout", [Known, Larger])
@pytest.mark.parametrize("names", [["uid-owner"], ["uid-owner", "gid-owner", "socket-exists"]], ids=len)
def test_every_option_is_found(layout: type[Known | Larger], names: list[str], base: int) -> None:
    listed = (layout * (len(names) + 1))()  # and one without a name
    for entry, name in zip(listed, names, strict=False):
        entry.name, entry.min, entry.max = name.encode(), 1, 0xFFFFFFFF
        if isinstance(entry, Larger):
            entry.base = base

    found = list(entries(ctypes.cast(listed, ctypes.POINTER(Known))))

    assert [entry.name for entry in found] == [*(name.encode() for name in names), None]
    assert all(entry.max == 0xFFFFFFFF for entry in found[:-1])
    assert ctypes.addressof(found[0]) == ctypes.addressof(listed)
