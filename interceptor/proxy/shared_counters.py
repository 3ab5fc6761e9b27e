"""Numbers of several processes in one shared memory: each publishes its own, one adds them up. Knows not what they count.

What a process had published survives its death.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from typing import TypeAlias, Union

# Nested as in JSON: {"accepted": 3, "ended": {"closed": 2}}.
Number: TypeAlias = int | float
Numbers: TypeAlias = Mapping[str, Union[int, float, "Numbers"]]

SLAB_SIZE = 64 * 1024  # a hundred times what the counters take; histograms have room
# A version that is odd while the slab is being written, and how long the JSON after it is.
HEAD = struct.Struct("=II")
READ_TRIES = 1000


class SharedCounters:
    """`count` slabs, to be made before the processes are forked."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._memory = mmap.mmap(-1, count * SLAB_SIZE)
        self._last = [""] * count

    def publish(self, index: int, numbers: Numbers) -> None:
        """Make `numbers` those of process `index`. By that process alone. Raises ValueError when they are too many."""
        content = json.dumps(numbers)
        if content == self._last[index]:
            return
        encoded = content.encode()
        if HEAD.size + len(encoded) > SLAB_SIZE:
            raise ValueError(f"{len(encoded)} bytes of counters; {SLAB_SIZE - HEAD.size} have room")
        start = index * SLAB_SIZE
        version, _ = HEAD.unpack_from(self._memory, start)
        HEAD.pack_into(self._memory, start, version | 1, 0)
        self._memory[start + HEAD.size : start + HEAD.size + len(encoded)] = encoded
        HEAD.pack_into(self._memory, start, ((version | 1) + 1) & 0xFFFFFFFF, len(encoded))
        self._last[index] = content

    def read(self, index: int) -> Numbers:
        """What process `index` published last; empty when nothing, or when it died in the middle of publishing."""
        start = index * SLAB_SIZE
        for _ in range(READ_TRIES):
            version, size = HEAD.unpack_from(self._memory, start)
            content = self._memory[start + HEAD.size : start + HEAD.size + size]
            if not version & 1 and HEAD.unpack_from(self._memory, start) == (version, size):
                numbers: Numbers = json.loads(content) if size else {}
                return numbers
        return {}

    def clear(self, index: int) -> None:
        """Forget the numbers of process `index`, which has ended."""
        self._last[index] = ""
        HEAD.pack_into(self._memory, index * SLAB_SIZE, 0, 0)


def added(left: Numbers, right: Numbers) -> dict[str, Number | Numbers]:
    """Number by number; what only one of them has is taken from it."""
    total = dict(left)
    for name, value in right.items():
        mine = total.get(name)
        if mine is None:
            total[name] = value
        elif isinstance(mine, Mapping) and isinstance(value, Mapping):
            total[name] = added(mine, value)
        elif isinstance(mine, Mapping) or isinstance(value, Mapping):
            raise TypeError(f"{name} is a number in one and a table in the other")
        else:
            total[name] = mine + value
    return total
