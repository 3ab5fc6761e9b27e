"""As much of protocol buffers as CRI's requests and answers take: numbers, strings and messages.

Written by hand: stubs made by a compiler would be 400 kB of code nobody reads, for ten messages.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

VARINT, LENGTH = 0, 2  # wire types

Value: TypeAlias = "int | str | Mapping[int, Value] | tuple[Value, ...]"


def encode(message: Mapping[int, Value]) -> bytes:
    """A message, by field numbers; a tuple is a repeated field."""
    return b"".join(_field(number, value) for number, value in message.items())


def _field(number: int, value: Value) -> bytes:
    if isinstance(value, tuple):
        return b"".join(_field(number, each) for each in value)
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    content = value.encode() if isinstance(value, str) else encode(value)
    return _varint(number << 3 | LENGTH) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def decode(content: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a message, each with all its values, in order."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(content):
        key, at = _read_varint(content, at)
        value, at = _read_varint(content, at)
        if key & 7 == LENGTH:
            found.setdefault(key >> 3, []).append(content[at : at + value])
            at += value
        else:
            assert key & 7 == VARINT, f"wire type {key & 7} is not used by CRI"
            found.setdefault(key >> 3, []).append(value)
    return found


def text(message: Mapping[int, list[int | bytes]], number: int) -> str:
    """A string field; "" when it is missing, as protocol buffers mean it."""
    value = message.get(number, [b""])[-1]
    assert isinstance(value, bytes)
    return value.decode()


def number(message: Mapping[int, list[int | bytes]], field: int) -> int:
    """A number field; 0 when it is missing."""
    value = message.get(field, [0])[-1]
    assert isinstance(value, int)
    return value


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
