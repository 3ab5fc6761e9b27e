"""Write flow records to a descriptor without ever stopping the proxy: a bounded queue and a thread. Knows no record's content.

A reader that is slow or gone costs records, which are counted, never connections.
"""

from __future__ import annotations

import os
import queue
import sys
import threading

# At 300 bytes a record 3 MB; at 5,000 connections a second, two seconds of a reader that is away.
LIMIT = 10_000
# A reader that is stuck must not keep the proxy from ending.
CLOSE_S = 1.0


class FlowLog:
    """`write` from the proxy's thread; the records appear at `descriptor`, in order."""

    def __init__(self, descriptor: int) -> None:
        self.lost = 0
        self._descriptor = descriptor
        self._queue: queue.Queue[str | None] = queue.Queue(LIMIT)
        # A daemon: one that hangs in write(2) ends with the process.
        self._thread = threading.Thread(target=self._drain, name="flow log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Hand over one record; never waits."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what is queued, for CLOSE_S at most."""
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _drain(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                _write_all(self._descriptor, line.encode() + b"\n")
            except OSError as error:
                # Tried again with the next record: a full disk may have room by then.
                if not self.lost:
                    print(f"interceptor: flow log: {error.strerror}: records are lost, connections go on", file=sys.stderr)
                self.lost += 1


def _write_all(descriptor: int, content: bytes) -> None:
    # Not by sys.stdout: its lock, held by a write that hangs, would keep the interpreter from ending.
    while content:
        content = content[os.write(descriptor, content) :]
