"""Write flow records to a descriptor without ever stopping the proxy: a bounded queue, and a thread that writes in batches.

Knows no record's content. A reader that is slow or gone costs records, which are counted, never connections.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from interceptor.proxy.metrics import RECORDS_LOST, RECORDS_WRITTEN, Counts

# A record held is about 1.5 KB of objects: 15 MB; at 5,000 connections a second, two seconds of a reader that is away.
LIMIT = 10_000
# How long the first record of a batch waits for others. Whoever watches the log does not see it; a write for each record
# would wake the reader, and this thread, for each connection.
BATCH_S = 0.1
# A reader that is stuck must not keep the proxy from ending.
CLOSE_S = 1.0
# Formatted in one go, some 100 µs; then the interpreter is offered to the proxy's own thread, which may have packets waiting.
# Less often is cheaper: each offer that is taken is two switches of threads.
STRIDE = 48
# Several workers write to one pipe: up to PIPE_BUF bytes are not mixed with another writer's (pipe(7)). A file takes more.
PIPE_BUF = 4096
FILE_CHUNK = 65536


class Record(Protocol):
    """What can be written."""

    def to_json(self) -> str:
        """One line without its newline."""


class FlowLog:
    """`write` from the proxy's thread; the records appear at `descriptor`, in order, each as a line of its own.

    To be made after a fork, not before: the thread does not come along.
    """

    def __init__(self, descriptor: int, counts: Counts) -> None:
        self._descriptor = descriptor
        self._cells = counts.cells
        self._written = RECORDS_WRITTEN.cell()
        # Each has one writer: the first this object's user, the second its thread.
        self._not_read = RECORDS_LOST.cell("not_read")
        self._not_written = RECORDS_LOST.cell("not_written")
        self._queue: deque[Record] = deque()
        self._sleeps = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._torn = False
        self._complained = False
        # A daemon: one that hangs in write(2) ends with the process.
        self._thread = threading.Thread(target=self._run, name="flow log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Records lost so far."""
        return self._cells[self._not_read] + self._cells[self._not_written]

    def write(self, record: Record) -> None:
        """Hand over one record; never waits, never formats."""
        if len(self._queue) >= LIMIT:
            self._cells[self._not_read] += 1
            return
        self._queue.append(record)
        if self._sleeps:
            self._sleeps = False
            self._wake.set()

    def close(self) -> None:
        """Write what is queued, for CLOSE_S at most; what is left then is lost, and counted."""
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._cells[self._not_read] += len(self._queue)

    def _run(self) -> None:
        while True:
            self._wait()
            if not self._queue:
                return
            self._closing.wait(BATCH_S)
            self._write_batch(len(self._queue))

    def _wait(self) -> None:
        # Said before looking, so that a record that comes between the two wakes us.
        self._sleeps = True
        while not self._queue and not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            self._sleeps = True
        self._sleeps = False

    def _write_batch(self, size: int) -> None:
        limit = PIPE_BUF if stat.S_ISFIFO(os.fstat(self._descriptor).st_mode) else FILE_CHUNK
        for chunk, lines in chunks(self._lines(size), limit):
            rest = self._write(chunk)
            lost = min(lines, rest.count(b"\n"))  # it may begin with one that ends a torn line
            self._cells[self._written] += lines - lost
            self._cells[self._not_written] += lost

    def _lines(self, size: int) -> Iterator[bytes]:
        for number in range(size):
            # A surrogate can't be UTF-8; `\\udc80` is what JSON writes for it.
            yield self._queue.popleft().to_json().encode("utf-8", "backslashreplace") + b"\n"
            if number % STRIDE == STRIDE - 1:
                time.sleep(0)

    def _write(self, chunk: bytes) -> bytes:
        """What could not be written of `chunk`: nothing, when all is well."""
        rest = b"\n" + chunk if self._torn else chunk
        while rest:
            try:
                # Not by sys.stdout: its lock, held by a write that hangs, would keep the interpreter from ending.
                size = os.write(self._descriptor, rest)
            except BlockingIOError:
                # Whoever gave us the descriptor has it non-blocking; we have the time to wait.
                _wait_for_room(self._descriptor)
                continue
            except OSError as error:
                # Tried again with the next record: a full disk may have room by then. What was begun gets its end there.
                self._complain(error)
                return rest
            self._torn = rest[size - 1 : size] != b"\n"
            rest = rest[size:]
        return rest

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            print(f"interceptor: flow log: {error.strerror}: records are lost, connections go on", file=sys.stderr)


def _wait_for_room(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()


def chunks(lines: Iterable[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """The lines joined to pieces of up to `limit` bytes, and how many each is made of; a longer line is a piece of its own."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        if chunk and size + len(line) > limit:
            yield b"".join(chunk), len(chunk)
            chunk, size = [], 0
        chunk.append(line)
        size += len(line)
    if chunk:
        yield b"".join(chunk), len(chunk)
