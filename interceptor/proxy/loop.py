"""A small event loop: epoll, timers, and descriptors closed only after the batch. Knows nothing of what it watches.

asyncio would cost 50 ms at import and two objects a read; this one calls a function with an event mask.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

OnReady: TypeAlias = Callable[[int], None]

# How many events one epoll_wait may return: enough for a burst, small enough that timers are not starved.
MAX_EVENTS = 256


class Scheduled:
    """A call to come. `cancel()` is final and cheap: the heap forgets it when its time comes."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Make it not happen."""
        self.callback = None


class Loop:
    """Runs callbacks when descriptors are ready or times have come, in one thread, until `stop()`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._on_ready: dict[int, OnReady] = {}
        self._timers: list[tuple[float, int, Scheduled]] = []
        self._order = itertools.count()
        self._doomed: list[socket.socket] = []
        self._running = False
        self._wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self._wake_read, select.EPOLLIN, self._drain_wakeups)
        self.on_wakeup: Callable[[bytes], None] = lambda _bytes: None

    def watch(self, descriptor: int, mask: int, on_ready: OnReady) -> None:
        """Call `on_ready(events)` whenever `descriptor` is ready for `mask` (level-triggered), broken or hung up."""
        self._epoll.register(descriptor, mask)
        self._on_ready[descriptor] = on_ready

    def change(self, descriptor: int, mask: int) -> None:
        """Watch `descriptor` for `mask` from now on."""
        self._epoll.modify(descriptor, mask)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching `descriptor`; nothing happens when it is not watched."""
        if self._on_ready.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def dispose(self, sock: socket.socket) -> None:
        """Stop watching `sock` and close it after the current batch of events.

        Closing at once would let a new connection get the same number while events of the old one are still in the batch.
        """
        self.unwatch(sock.fileno())
        self._doomed.append(sock)

    def later(self, delay_s: float, callback: Callable[[], None]) -> Scheduled:
        """Call `callback` once, `delay_s` seconds from now."""
        scheduled = Scheduled(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), scheduled))
        return scheduled

    def wake(self, message: bytes = b"\0") -> None:
        """Interrupt the wait, from any thread; `on_wakeup` gets `message`. Signals arrive the same way."""
        with suppress(BlockingIOError):  # a full pipe wakes it as well
            os.write(self.wake_write, message)

    def run(self) -> None:
        """Serve until `stop()`."""
        self._running = True
        while self._running:
            self.run_once()

    def run_once(self) -> None:
        """Wait for one batch of events, serve it and the timers that are due, then close what was disposed of."""
        for descriptor, events in self._epoll.poll(self._timeout(), MAX_EVENTS):
            on_ready = self._on_ready.get(descriptor)
            if on_ready is not None:
                on_ready(events)
        self._run_timers()
        for sock in self._doomed:
            sock.close()
        self._doomed.clear()

    def stop(self) -> None:
        """Leave `run` after the current batch. From within a callback only; other threads `wake` it."""
        self._running = False

    def close(self) -> None:
        """Give back the loop's own descriptors; what it watched belongs to others."""
        for sock in self._doomed:
            sock.close()
        self._epoll.close()
        os.close(self._wake_read)
        os.close(self.wake_write)

    def _timeout(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1.0

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            scheduled = heapq.heappop(self._timers)[2]
            callback, scheduled.callback = scheduled.callback, None
            if callback is not None:
                callback()

    def _drain_wakeups(self, _events: int) -> None:
        self.on_wakeup(os.read(self._wake_read, 4096))
