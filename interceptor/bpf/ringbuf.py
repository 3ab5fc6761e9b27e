"""Read a BPF ring buffer: records appear in order, and its descriptor polls readable. Knows no record's content.

The layout is kernel/bpf/ringbuf.c: a page with the consumer's position, a page with the producer's, the data mapped twice
so that a record never wraps. Each record has a header of eight bytes: length with two flag bits, and an offset.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from interceptor.bpf.maps import Map

BUSY = 1 << 31  # BPF_RINGBUF_BUSY_BIT: reserved, not yet written
DISCARD = 1 << 30  # BPF_RINGBUF_DISCARD_BIT
HEADER_SIZE = 8


class RingBuffer:
    """The consumer of one ring buffer map; there may be only one."""

    def __init__(self, ring: Map) -> None:
        size = ring.definition.max_entries
        page = mmap.PAGESIZE
        self._page = page
        self._mask = size - 1
        self._consumer = mmap.mmap(ring.descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(ring.descriptor, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        (self._position,) = struct.unpack_from("=Q", self._consumer, 0)
        self._descriptor = ring.descriptor

    def fileno(self) -> int:
        """What to poll."""
        return self._descriptor

    def peek(self) -> bytes | None:
        """The next record, left where it is; None when there is none."""
        (produced,) = struct.unpack_from("=Q", self._producer, 0)
        if self._position >= produced:
            return None
        offset = self._page + (self._position & self._mask)
        (header,) = struct.unpack_from("=I", self._producer, offset)
        return None if header & (BUSY | DISCARD) else self._producer[offset + HEADER_SIZE : offset + HEADER_SIZE + header]

    def read(self) -> Iterator[bytes]:
        """All records that are there now. Their room is given back one by one, as they are taken."""
        # The producer's position each time anew: a record committed while we read wakes nobody.
        while self._position < struct.unpack_from("=Q", self._producer, 0)[0]:
            offset = self._page + (self._position & self._mask)
            (header,) = struct.unpack_from("=I", self._producer, offset)
            if header & BUSY:
                return
            length = header & ~(BUSY | DISCARD)
            record = self._producer[offset + HEADER_SIZE : offset + HEADER_SIZE + length]
            self._position += (length + HEADER_SIZE + 7) & ~7
            struct.pack_into("=Q", self._consumer, 0, self._position)
            if not header & DISCARD:
                yield record

    def close(self) -> None:
        """Unmap; the map's descriptor is its owner's."""
        self._consumer.close()
        self._producer.close()
