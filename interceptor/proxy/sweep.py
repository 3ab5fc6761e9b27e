"""Keep the time limits of all connections by looking at them now and then: no timer and no heap entry for each.

Knows a connection's state, age and byte count. A limit is exceeded by at most a quarter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from interceptor.proxy.connection import Connection
from interceptor.proxy.hooks import HEAR_TIMEOUT_S
from interceptor.proxy.loop import Loop
from interceptor.proxy.session import Event, State
from interceptor.proxy.settings import ProxySettings
from interceptor.proxy.upstream import notice_dead_peer

# While its upstream is being opened, a client that gives up is noticed after this long.
OPENING_TICK_S = 0.05
# A relay that has run for this long may run for long, so its peers are asked from then on whether they live. A fraction of
# the time after which they are first asked (upstream.KEEPALIVE_S), and more than most connections last.
LASTING_TICK_S = 20.0
QUARTERS = 4


class Sweep:
    """All connections of one proxy. `add` them when they begin, `remove` them when they have ended."""

    def __init__(self, loop: Loop, settings: ProxySettings) -> None:
        self.connections: set[Connection] = set()
        self.on_empty: Callable[[], None] | None = None  # called whenever the last connection has ended
        self._loop = loop
        self._connect_timeout_s = settings.connect_timeout_s
        self._idle_timeout_s = settings.idle_timeout_s
        self._keepalive_s = settings.keepalive_s
        self._opening: list[Connection] = []  # and those begun since the last look, whatever became of them
        self._opening_tick_s = min(OPENING_TICK_S, settings.connect_timeout_s / QUARTERS)
        limits_s = [limit for limit in (settings.idle_timeout_s, settings.keepalive_s) if limit is not None]
        self._lasting_tick_s = min(LASTING_TICK_S, *(limit / QUARTERS for limit in limits_s), LASTING_TICK_S)
        self._looks_at_lasting = False

    def add(self, connection: Connection) -> None:
        """Keep `connection`'s limits from now on."""
        self.connections.add(connection)
        if not self._opening:
            self._loop.later(self._opening_tick_s, self._look_at_opening)
            if not self._looks_at_lasting:
                self._looks_at_lasting = True
                self._loop.later(self._lasting_tick_s, self._look_at_lasting)
        self._opening.append(connection)

    def remove(self, connection: Connection) -> None:
        """It has ended."""
        self.connections.discard(connection)
        if not self.connections and self.on_empty is not None:
            self.on_empty()

    def _look_at_opening(self) -> None:
        now = time.monotonic()
        limits_s = {State.LISTENING: HEAR_TIMEOUT_S, State.OPENING: self._connect_timeout_s}
        self._opening = [connection for connection in self._opening if connection.state in limits_s]
        for connection in self._opening:
            if now - connection.start >= limits_s[connection.state]:
                connection.feed(Event.TIME_UP)
            else:
                connection.watch_client()
        if self._opening:
            self._loop.later(self._opening_tick_s, self._look_at_opening)

    def _look_at_lasting(self) -> None:
        now = time.monotonic()
        for connection in tuple(self.connections):
            if connection.state < State.RELAYING:
                continue
            running = connection.running
            moved = 0 if running is None else running.sent + running.received  # None: its first bytes are awaited
            if moved != connection.moved_before:
                connection.moved_before = moved
                connection.moved_at = now
                connection.count_moved()
            elif self._idle_timeout_s is not None and now - connection.moved_at >= self._idle_timeout_s:
                connection.feed(Event.TIME_UP)
            elif not connection.lasts and self._keepalive_s is not None and running is not None and running.asks_peers:
                connection.lasts = True
                with suppress(OSError):  # reset meanwhile: the relay is about to report it
                    notice_dead_peer(connection.client, self._keepalive_s)
                    notice_dead_peer(connection.upstream, self._keepalive_s)
        self._looks_at_lasting = bool(self.connections)
        if self._looks_at_lasting:
            self._loop.later(self._lasting_tick_s, self._look_at_lasting)
