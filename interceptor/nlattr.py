"""Netlink attributes: build them, read them. Pure; what they say is others' business. Layout: linux/netlink.h."""

from __future__ import annotations

import struct

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
    return {kind & NLA_TYPE_MASK: value for kind, value in flagged(payload)}


def attrs(payload: bytes) -> list[tuple[int, bytes]]:
    """The same in order, repeated ones too."""
    return [(kind & NLA_TYPE_MASK, value) for kind, value in flagged(payload)]


def flagged(payload: bytes) -> list[tuple[int, bytes]]:
    """The same with the flag bits."""
    found: list[tuple[int, bytes]] = []
    position, size, read = 0, len(payload), _HEADER.unpack_from
    while position + 4 <= size:
        length, kind = read(payload, position)
        if length < 4:
            break
        found.append((kind, payload[position + 4 : position + length]))
        position += (length + 3) & ~3
    return found
