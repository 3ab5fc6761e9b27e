"""Netlink attributes: build them, read them. Pure; what they say is others' business. Layout: linux/netlink.h."""

from __future__ import annotations

import struct
from collections.abc import Iterator

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
_HEADER = struct.Struct("=HH")  # struct nlattr


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    length = _HEADER.size + len(payload)
    return _HEADER.pack(length, kind) + payload + bytes(-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute of attributes."""
    return attr(kind | NLA_F_NESTED, b"".join(attributes))


def parse_attrs(payload: bytes) -> dict[int, bytes]:
    """The attributes in `payload` by type, without the flag bits; of a repeated one the last. A cut-off tail is left out."""
    return dict(attrs(payload))


def attrs(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The same in order, repeated ones too."""
    for kind, value in flagged(payload):
        yield kind & NLA_TYPE_MASK, value


def flagged(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The same with the flag bits."""
    position = 0
    while position + _HEADER.size <= len(payload):
        length, kind = _HEADER.unpack_from(payload, position)
        if length < _HEADER.size:
            break
        yield kind, payload[position + _HEADER.size : position + length]
        position += (length + 3) & ~3
