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
from interceptor.proxy.upstream import KEEPALIVE_COUNT, notice_dead_peer

# While its upstream is being opened, a client that gives up is noticed after this long.
OPENING_TICK_S = 0.05
# A relay that has run for this long may run for long, so its peers are asked from then on whether they live. A fraction of
# the time after which they are first asked (upstream.KEEPALIVE_S), and more than most connections last.
LASTING_TICK_S = 20.0
QUARTERS = 4
# Of the time after which conntrack forgets a half-closed connection: two looks, a third apart, tell that it is silent, and its
# peers are asked at once.
THIRDS = 3
MAX_KEEPALIVE_COUNT = 127  # MAX_TCP_KEEPCNT, linux/tcp.h


class Sweep:
    """All connections of one proxy. `add` them when they begin, `remove` them when they have ended.

    half_closed_timeout_s: after so long conntrack forgets a half-closed connection, and what was captured would lose its NAT.
    """

    def __init__(self, loop: Loop, settings: ProxySettings, half_closed_timeout_s: float | None) -> None:
        self.connections: set[Connection] = set()
        self.on_empty: Callable[[], None] | None = None  # called whenever the last connection has ended
        self._loop = loop
        self._connect_timeout_s = settings.connect_timeout_s
        self._idle_timeout_s = settings.idle_timeout_s
        self._keepalive_s = settings.keepalive_s
        self._opening: list[Connection] = []  # and those begun since the last look, whatever became of them
        self._opening_tick_s = min(OPENING_TICK_S, settings.connect_timeout_s / QUARTERS)
        self._half_closed_s = None if half_closed_timeout_s is None else max(1.0, half_closed_timeout_s / THIRDS)
        limits_s = [limit for limit in (settings.idle_timeout_s, settings.keepalive_s) if limit is not None]
        ticks_s = [LASTING_TICK_S, *(limit / QUARTERS for limit in limits_s)]
        self._lasting_tick_s = min(ticks_s if self._half_closed_s is None else [*ticks_s, self._half_closed_s])
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
            elif connection.state > State.RELAYING and not connection.is_kept_tracked:
                self._keep_tracked(connection)
            elif not connection.lasts and self._keepalive_s is not None and running is not None and running.asks_peers:
                connection.lasts = True
                with suppress(OSError):  # reset meanwhile: the relay is about to report it
                    notice_dead_peer(connection.client, self._keepalive_s)
                    notice_dead_peer(connection.upstream, self._keepalive_s)
        self._looks_at_lasting = bool(self.connections)
        if self._looks_at_lasting:
            self._loop.later(self._lasting_tick_s, self._look_at_lasting)

    def _keep_tracked(self, connection: Connection) -> None:
        """Have packets go before conntrack forgets a half-closed connection: nobody else may send any for long."""
        connection.is_kept_tracked = connection.lasts = True
        running = connection.running
        if self._half_closed_s is None or running is None or not running.asks_peers:
            return
        # A peer that does not answer is given as long as it would be otherwise.
        patience_s = float("inf") if self._keepalive_s is None else KEEPALIVE_COUNT * self._keepalive_s
        count = int(max(1, min(MAX_KEEPALIVE_COUNT, patience_s / self._half_closed_s)))
        with suppress(OSError):  # as above
            notice_dead_peer(connection.client, self._half_closed_s, count)
            notice_dead_peer(connection.upstream, self._half_closed_s, count)
