"""A small event loop: epoll, timers, and descriptors closed only after the batch. Knows nothing of what it watches.

A descriptor is registered once, edge-triggered, for its whole life: one epoll_ctl, and one more if it ever lacks room. Who is
told may change. Closing takes it out, since nobody else has it. asyncio would cost 50 ms at import and two objects a read.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
from collections.abc import Callable
from contextlib import suppress
from select import EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from socket import SocketType
from time import monotonic
from typing import TypeAlias

OnReady: TypeAlias = Callable[[int], None]

# All that may happen to a stream. EPOLLERR and EPOLLHUP need no asking for (epoll_ctl(2)). EPOLLPRI: a read stops at the
# mark of urgent data, so a short one does not mean that nothing is left.
STREAM = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET
# The same without room. A connected socket has room from the start, and says so at once, and again when its FIN is acked.
ARRIVALS = STREAM & ~EPOLLOUT
LISTENER = EPOLLIN | EPOLLET
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
        self._now = 0.0  # monotonic(), not long ago
        self._doomed: list[SocketType] = []
        self._postponed: list[Callable[[], None]] = []
        self._running = False
        self._wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self._wake_read, EPOLLIN, self._drain_wakeups)
        self.on_wakeup: Callable[[bytes], None] = lambda _bytes: None

    def watch(self, descriptor: int, mask: int, on_ready: OnReady) -> None:
        """Call `on_ready(events)` whenever `descriptor` is ready for `mask`, broken or hung up.

        With EPOLLET in `mask` (STREAM, LISTENER): once for each change, so whoever is told must take what there is.
        """
        self._epoll.register(descriptor, mask)
        self._on_ready[descriptor] = on_ready

    def watch_stream(self, descriptor: int, on_ready: OnReady) -> None:
        """As `watch` for STREAM; a descriptor that is watched already is only told to somebody else from now on."""
        if descriptor not in self._on_ready:
            self._epoll.register(descriptor, STREAM)
        self._on_ready[descriptor] = on_ready

    def watch_arrivals(self, descriptor: int, on_ready: OnReady) -> None:
        """As `watch_stream`, for ARRIVALS."""
        if descriptor not in self._on_ready:
            self._epoll.register(descriptor, ARRIVALS)
        self._on_ready[descriptor] = on_ready

    def watch_room(self, descriptor: int, on_ready: OnReady) -> None:
        """Watch `descriptor` as a STREAM from now on, whatever it was watched for; room that is there already is told."""
        if descriptor in self._on_ready:
            self._epoll.modify(descriptor, STREAM)
        else:
            self._epoll.register(descriptor, STREAM)
        self._on_ready[descriptor] = on_ready

    def is_watched(self, descriptor: int) -> bool:
        """Whether somebody is told of `descriptor`."""
        return descriptor in self._on_ready

    def neglect(self, descriptor: int) -> None:
        """Tell nobody of `descriptor` until it is closed, which costs less than to `unwatch` it."""
        self._on_ready.pop(descriptor, None)

    def tell(self, descriptor: int, events: int) -> None:
        """Tell whoever watches `descriptor` of `events` that were told to somebody before."""
        on_ready = self._on_ready.get(descriptor)
        if on_ready is not None:
            on_ready(events)

    def change(self, descriptor: int, mask: int) -> None:
        """Watch `descriptor` for `mask` from now on."""
        self._epoll.modify(descriptor, mask)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching `descriptor`; nothing happens when it is not watched."""
        if self._on_ready.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def dispose(self, sock: SocketType) -> None:
        """Tell nobody of `sock` any more, and close it after the current batch of events; its descriptor must be the only one.

        Closing at once would let a new connection get the same number while events of the old one are still in the batch.
        """
        self._on_ready.pop(sock.fileno(), None)
        self._doomed.append(sock)

    def postpone(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, in the next round, whose events come first: for what would keep the others waiting now."""
        self._postponed.append(callback)

    def later(self, delay_s: float, callback: Callable[[], None]) -> Scheduled:
        """Call `callback` once, `delay_s` seconds from now."""
        scheduled = Scheduled(callback)
        self._now = monotonic()
        heapq.heappush(self._timers, (self._now + delay_s, next(self._order), scheduled))
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
        """Wait for one batch of events, serve it, what was postponed and the timers due; then close what was disposed of."""
        timers, postponed = self._timers, self._postponed
        # Measured once a round, after the wait: a timer may be late by what the batch takes, which it would be anyway.
        timeout_s = 0.0 if postponed else max(0.0, timers[0][0] - self._now) if timers else -1.0
        handler_of = self._on_ready.get
        for descriptor, events in self._epoll.poll(timeout_s, MAX_EVENTS):
            on_ready = handler_of(descriptor)
            if on_ready is not None:
                on_ready(events)
        if postponed:
            self._postponed = []
            for callback in postponed:
                callback()
        if timers:
            self._now = now = monotonic()
            if timers[0][0] <= now:
                self._run_timers(now)
        doomed = self._doomed
        if doomed:
            for sock in doomed:
                sock.close()
            doomed.clear()

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

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            scheduled = heapq.heappop(self._timers)[2]
            callback, scheduled.callback = scheduled.callback, None
            if callback is not None:
                callback()

    def _drain_wakeups(self, _events: int) -> None:
        self.on_wakeup(os.read(self._wake_read, 4096))
