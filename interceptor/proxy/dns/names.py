"""Which name an address was the answer for: a table of fixed size that all workers share. Knows no messages and no flows.

Any worker may have asked, and any may have the connection that follows, so the table is in shared memory, made before the
fork. Nobody locks: an entry has a check sum, and one that another worker is just writing counts as absent.
"""

from __future__ import annotations

import mmap
import socket
import struct
import time
import zlib
from collections.abc import Callable

# 4,096 addresses at 128 bytes are 512 KiB, whatever anybody asks for.
SETS, WAYS = 1024, 4
# Clients use an address for longer than they should (a JVM for 30 s more, a connection pool until it is told).
GRACE_S = 60
_ENTRY = struct.Struct("=IQ16sB99s")  # check sum, end of its time in ms, address, length of the name, name
NAME_LIMIT = 99  # a longer name is remembered by its end, which says more than its beginning
_BODY, _KEY = 4, 12  # where what is summed begins, and the address


class Names:
    """`clock` is in seconds, and the same for all who share the table."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._table = mmap.mmap(-1, SETS * WAYS * _ENTRY.size)

    def learn(self, address: bytes, name: str, ttl: int) -> None:
        """`address`, packed in 4 or 16 bytes, was in an answer for `name` that lives `ttl` seconds."""
        text = name.encode("ascii", "backslashreplace")
        if len(text) > NAME_LIMIT:
            text = b"..." + text[3 - NAME_LIMIT :]
        now_ms = int(self._clock() * 1000)
        key = address.ljust(16, b"\0")
        at = self._place(key, now_ms)
        until_ms = now_ms + (ttl + GRACE_S) * 1000
        entry = _ENTRY.pack(0, until_ms, key, len(text), text)
        self._table[at : at + _ENTRY.size] = struct.pack("=I", zlib.crc32(entry[_BODY:])) + entry[_BODY:]

    def name_of(self, address: str) -> str | None:
        """The name that `address` was last the answer for; None when there is none, or it is too long ago."""
        key = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address).ljust(16, b"\0")
        first = _set_of(key)
        # Once for every connection: one call where most have no name.
        at = self._table.find(key, first, first + WAYS * _ENTRY.size) - _KEY
        if at < first or (at - first) % _ENTRY.size:
            return None
        entry = self._table[at : at + _ENTRY.size]
        check, until_ms, _, length, text = _ENTRY.unpack(entry)
        if until_ms <= self._clock() * 1000 or check != zlib.crc32(entry[_BODY:]):
            return None
        return str(text[:length], "ascii")

    def _place(self, key: bytes, now_ms: int) -> int:
        # Its own entry, else the one that ends first: an empty one ended before time began.
        best, best_until = -1, 0
        first = _set_of(key)
        for at in range(first, first + WAYS * _ENTRY.size, _ENTRY.size):
            _, until_ms, held, _, _ = _ENTRY.unpack_from(self._table, at)
            if held == key:
                return at
            until_ms = until_ms if until_ms > now_ms else 0
            if best < 0 or until_ms < best_until:
                best, best_until = at, until_ms
        return best


def _set_of(key: bytes) -> int:
    return zlib.crc32(key) % SETS * WAYS * _ENTRY.size
