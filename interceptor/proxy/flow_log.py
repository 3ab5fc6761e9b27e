"""Write flow records to a descriptor without ever stopping the proxy: batches, a bounded queue and a thread.

A reader that is slow or gone costs records, which are counted, never connections. Knows no record's content.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import TypeAlias

# At 400 bytes a record 4 MB; at 5,000 connections a second, two seconds of a reader that is away.
LIMIT = 10_000
# Waking the thread for each record would cost more than the record, and have the kernel take the processor from the proxy.
DELAY_S = 0.1
# What a pipe takes at most. When several processes write to one, only so much as the kernel writes in one piece (PIPE_BUF,
# pipe(7)): records must not be torn.
CHUNK_SIZE = 64 * 1024
SHARED_CHUNK_SIZE = 4096
# A reader that is stuck must not keep the proxy from ending.
CLOSE_S = 1.0

Later: TypeAlias = Callable[[float, Callable[[], None]], object]


class FlowLog:
    """`write` from the proxy's thread; the records appear at `descriptor`, in order, a batch every DELAY_S.

    `later` calls back in the proxy's thread; `alone`: no other process writes there.
    """

    def __init__(self, descriptor: int, later: Later, *, alone: bool = True) -> None:
        self.lost = 0
        self._chunk_size = CHUNK_SIZE if alone else SHARED_CHUNK_SIZE
        self._later = later
        self._batch: list[str] = []
        self._queued = 0  # in all, by the proxy's thread
        self._done = 0  # in all, by ours
        self._descriptor = descriptor
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # A daemon: one that hangs in write(2) ends with the process.
        self._thread = threading.Thread(target=self._drain, name="flow log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Hand over one record; never waits."""
        if not self._batch:
            self._later(DELAY_S, self.flush)
        self._batch.append(line)

    def flush(self) -> None:
        """Let the thread have what was written so far."""
        batch, self._batch = self._batch, []
        room = LIMIT - (self._queued - self._done)
        if len(batch) > room:
            self.lost += len(batch) - room
            del batch[room:]
        if batch:
            self._queued += len(batch)
            batch.append("")
            self._queue.put("\n".join(batch).encode())

    def close(self) -> None:
        """Write what is queued, for CLOSE_S at most."""
        self.flush()
        self._queue.put(b"")
        self._thread.join(CLOSE_S)

    def _drain(self) -> None:
        while records := self._queue.get():
            start = 0
            while start < len(records):
                # Whole records, as many as go in one piece; one that is longer goes alone.
                end = records.rfind(b"\n", start, start + self._chunk_size) + 1 or records.index(b"\n", start) + 1
                self._write(records[start:end])
                start = end

    def _write(self, records: bytes) -> None:
        count = records.count(b"\n")
        try:
            _write_all(self._descriptor, records)
        except OSError as error:
            # Tried again with the next records: a full disk may have room by then.
            if not self.lost:
                print(f"interceptor: flow log: {error.strerror}: records are lost, connections go on", file=sys.stderr)
            self.lost += count
        self._done += count


def _write_all(descriptor: int, content: bytes) -> None:
    # Not by sys.stdout: its lock, held by a write that hangs, would keep the interpreter from ending.
    while content:
        content = content[os.write(descriptor, content) :]
