"""The packet relay: client and server hold one TCP connection, translated in the kernel, while the proxy sleeps.

`prepare` tells the programs of interceptor/bpf/src of a flow before its upstream is connected; they arm it when the server
answers, and from then on both sockets are silent and only keep their ports. What could not be armed is relayed by splice, which
is counted by reason. Knows no map (packet_table) and not where programs are attached (packet_attach).
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from select import EPOLLET, EPOLLIN
from socket import SHUT_WR, SOCK_STREAM, SocketType

from interceptor.proxy.hooks import Hooks
from interceptor.proxy.listeners import BoundListener
from interceptor.proxy.loop import Loop
from interceptor.proxy.metrics import FALLBACKS_MADE, Counts
from interceptor.proxy.relay import packet_layout as layout
from interceptor.proxy.relay.base import Edges, Relay, Running
from interceptor.proxy.relay.packet_adopt import Adopted, adopt
from interceptor.proxy.relay.packet_layout import Asked, Ends, State
from interceptor.proxy.relay.packet_table import Counts as FlowCounts
from interceptor.proxy.relay.packet_table import FlowTable, cookie_of, fall_silent, speak_again
from interceptor.proxy.session import Event
from interceptor.sockets import SockAddr

# The last acknowledgement may be lost: the other end repeats its FIN after its RTO, 200 ms and more. As long the sockets
# stay, for their ports: an application that got one would be mistaken for the flow.
LINGER_S = 0.5
# A RST is believed when its sender says nothing else for so long: after a forged one, the flow goes on (RFC 5961 3).
RESET_LINGER_S = 1.0
# Ends are not urgent; read together they cost one wake-up, not one each.
BATCH_S = 0.01
# What was forwarded is acknowledged by then, or the next time.
FORWARDED_CHECK_S = 1.0
# The upstream forwards them without hearing acknowledgements: less than ten segments (RFC 6928) of the smallest usual size.
PEEK_LIMIT = 8192


class PacketRelay:
    """All spliced flows of one process. `fallback` relays the others.

    asks: what is asked of each flow: HELD when no client's first bytes are looked at, FORWARDS when they are.
    """

    def __init__(self, loop: Loop, table: FlowTable, fallback: Relay) -> None:
        self._counts: Counts | None = None
        self.asks = Asked.HELD
        self.is_off = False
        self.is_leaving = False
        self._loop = loop
        self._table = table
        self._fallback = fallback
        self._begun: dict[int, int] = {}  # client's descriptor -> flow
        self._early: dict[int, layout.Event | None] = {}  # flow that is not running yet -> its end, if it is over
        self._running: dict[int, Splicing] = {}
        self._ending: deque[tuple[float, Splicing, layout.Event]] = deque()
        self._over: list[int] = []
        self._keepers: list[int] = []
        self._is_reading = False
        for ring in table.rings:
            loop.watch(ring.fileno(), EPOLLIN | EPOLLET, self._has_ended)

    def serve(self, listeners: list[BoundListener], hooks: Hooks, counts: Counts, *, peeks: bool) -> None:
        """Splice what these listeners accept, as far as `hooks` leave the flows as they are.

        peeks: the client's first bytes are looked at before `join`.
        """
        self._counts = counts
        self.is_off = hooks.preface is not None
        if self.is_off:
            return
        self.asks = Asked.FORWARDS if peeks or hooks.hear is not None else Asked.HELD
        for bound in listeners:
            if bound.protocol == "tcp" and bound.listener.direction != "dns":
                self._table.prepare_listener(bound.sock, 0 if self.asks is Asked.HELD else PEEK_LIMIT)

    def prepare(self, client: SocketType, upstream: SocketType) -> bytes:
        """See Relay.prepare."""
        if self.is_off:
            return self._fallback.prepare(client, upstream)
        try:
            flow_id = self._begun[client.fileno()] = self._table.begin(client, upstream, self.asks)
            self._early[flow_id] = None
        except OSError:
            self._not_spliced("no_entry")
        return b""

    def abandon(self, client: SocketType) -> None:
        """See Relay.abandon."""
        flow_id = self._begun.pop(client.fileno(), None)
        if flow_id is not None:
            del self._early[flow_id]
            self._loop_forget(flow_id)
        self._table.release(client)

    def join(self, client: SocketType, upstream: SocketType, edges: Edges) -> Running:
        """See Relay.join."""
        flow_id = self._begun.pop(client.fileno(), None)
        if flow_id is not None:
            end = self._early.pop(flow_id)
            refusal = self._table.refusal(flow_id)
            if refusal is None:
                running = self._running[flow_id] = Splicing(self, flow_id, client, upstream, edges)
                if end is not None:
                    self._note_end(running, end)
                return running
            self._not_spliced(refusal)
            self._table.forget([flow_id])
        self._table.release(client)
        return self._fallback.join(client, upstream, edges)

    def adopt(self) -> Iterator[tuple[Adopted, Callable[[Edges], Running]]]:
        """Flows of a process that is gone, each with what makes it a running one of ours."""
        for adopted in adopt(self._table, self._table.worker, self._table.workers):
            yield adopted, functools.partial(self._resume, adopted)

    def _not_spliced(self, reason: str) -> None:
        if self._counts is not None:
            self._counts.add(FALLBACKS_MADE, reason)

    def leave(self) -> None:
        """We stop, and another proxy will take over: flows still open go on without one."""
        self.is_leaving = self._table.keeps_flows

    def _resume(self, adopted: Adopted, edges: Edges) -> Running:
        running = Splicing(self, adopted.flow_id, adopted.client, adopted.upstream, edges)
        running.keepers = (cookie_of(adopted.client), cookie_of(adopted.upstream))
        self._running[adopted.flow_id] = running
        # Whoever was told is gone.
        if adopted.entry.state == State.ENDED:
            self._note_end(running, self._table.end_of(adopted.flow_id, adopted.entry))
        return running

    def close(self) -> None:
        """See Relay.close."""
        for ring in self._table.rings:
            self._loop.unwatch(ring.fileno())
        self._table.close()
        self._fallback.close()

    @property
    def table(self) -> FlowTable:
        """For its flows."""
        return self._table

    @property
    def loop(self) -> Loop:
        """For its flows."""
        return self._loop

    def stopped(self, running: Splicing) -> None:
        """`running` is over, or given up: its sockets are about to be closed, its entries are not needed any longer then."""
        self._running.pop(running.flow_id, None)
        if not running.is_over:
            self._keepers += running.keepers
            # Its sockets say RST now, whose sequence numbers the programs know.
            self._loop.later(LINGER_S, lambda: self._loop_forget(running.flow_id))

    def left(self, running: Splicing) -> None:
        """`running` goes on; its sockets are closed, silently."""
        self._running.pop(running.flow_id, None)

    def _has_ended(self, _events: int) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._loop.later(BATCH_S, self._read)

    def _read(self) -> None:
        self._is_reading = found = False
        for record in itertools.chain.from_iterable(ring.read() for ring in self._table.rings):
            found = True
            event = layout.unpack_event(record)
            running = self._running.get(event.flow)
            if running is not None:
                self._note_end(running, event)
            elif event.flow in self._early:
                # A short flow may be over before we hear that its upstream is connected.
                self._early[event.flow] = event
        if found:
            # The kernel wakes only who has read everything else (bpf_ringbuf_commit), and may not have seen yet that we had.
            self._has_ended(0)

    def _note_end(self, running: Splicing, event: layout.Event) -> None:
        linger_s = RESET_LINGER_S if event.ends & layout.RST else LINGER_S
        if not self._ending:
            self._loop.later(linger_s, self._end)
        self._ending.append((time.monotonic() + linger_s, running, event))

    def _end(self) -> None:
        now = time.monotonic()
        over: list[layout.Event] = []
        while self._ending and self._ending[0][0] <= now:
            _, running, event = self._ending.popleft()
            if not running.ended(event):
                continue
            if running.keepers:
                self._table.forget([running.flow_id], running.keepers)
            else:
                over.append(event)
        # Before the sockets are closed, after the batch: whoever got the upstream's port would find its entry in conntrack,
        # and go around us. They are silent by themselves by now.
        self._table.forget_ended(over)
        self._table.forget_tracked()
        if self._ending:
            self._loop.later(max(self._ending[0][0] - now, BATCH_S), self._end)

    def _loop_forget(self, flow_id: int | None) -> None:
        # After the batch, when the sockets are closed: until then the programs keep them silent.
        if flow_id is None:
            return
        if not self._over:
            self._loop.postpone(self._forget)
        self._over.append(flow_id)

    def _forget(self) -> None:
        self._table.forget(self._over, self._keepers)
        self._table.forget_tracked()
        self._over, self._keepers = [], []


class Splicing:
    """One spliced flow."""

    __slots__ = ("_client", "_edges", "_end", "_relay", "_upstream", "flow_id", "keepers")
    name = "packet"
    asks_peers = False

    def __init__(self, relay: PacketRelay, flow_id: int, client: SocketType, upstream: SocketType, edges: Edges) -> None:
        self.flow_id = flow_id
        self.keepers: tuple[int, ...] = ()
        self._relay = relay
        self._client = client
        self._upstream = upstream
        self._edges = edges
        self._end: tuple[int, int, float | None] | None = None  # bytes sent, received, when; once it is over

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or is left to others."""
        return self._end is not None

    @property
    def sent(self) -> int:
        """See Running.sent."""
        return self._relay.table.counts(self.flow_id).sent if self._end is None else self._end[0]

    @property
    def received(self) -> int:
        """See Running.received."""
        return self._relay.table.counts(self.flow_id).received if self._end is None else self._end[1]

    @property
    def ended_at(self) -> float | None:
        """See Running.ended_at."""
        return None if self._end is None else self._end[2]

    def start(self, first: bytes) -> None:
        """See Running.start. Most flows have nothing to be started: the ends talk already."""
        loop = self._relay.loop
        loop.neglect(self._client.fileno())
        loop.neglect(self._upstream.fileno())
        if self._relay.asks is Asked.HELD:
            fall_silent(self._upstream)
        else:
            self._forward(first)
        fall_silent(self._client)

    def stop(self) -> None:
        """See Running.stop."""
        if self.flow_id in self._relay._running:  # noqa: SLF001 - one module
            if self.is_over:
                self._relay.stopped(self)
                return
            counts = self._relay.table.counts(self.flow_id)
            if self._relay.is_leaving:
                self._relay.left(self)
            else:
                speak_again(self._client)
                speak_again(self._upstream)
                self._relay.stopped(self)
            self._end = (counts.sent, counts.received, None)

    def ended(self, event: layout.Event) -> bool:
        """The programs have seen the end, a while ago; whether it is one, and was not known."""
        if self.is_over:
            return False
        ends = event.ends
        sent, received = event.sent, event.received
        if ends & layout.RST:
            counts = self._relay.table.counts(self.flow_id)
            if _speaks_on(ends, counts, event.ended_ns + int(RESET_LINGER_S / 2 * 1e9)):
                self._relay.table.revive(self.flow_id)
                return False
            sent, received = counts.sent, counts.received
        self._end = (sent, received, event.ended_ns / 1e9)
        if self._relay.asks is not Asked.HELD:
            fall_silent(self._upstream)  # it may have had to forward
        if ends & Ends.UP_RST:
            self._edges.feed(Event.CLIENT_FAILED, errno.ECONNRESET)
        elif ends & Ends.DOWN_RST:
            self._edges.feed(Event.UPSTREAM_FAILED, errno.ECONNRESET)
        else:
            self._edges.feed(Event.CLIENT_EOF)
            self._edges.feed(Event.UPSTREAM_EOF)
        return True

    def _forward(self, said: bytes) -> None:
        """Pass on what the client has said before the flow was armed.

        No more can follow: by now it talks to the server. What does not fit was not acknowledged, and is said again.
        """
        is_eof = False
        with suppress(BlockingIOError, ConnectionError):
            while chunk := self._client.recv(PEEK_LIMIT):
                said += chunk
            is_eof = True
        with suppress(BlockingIOError, ConnectionError):
            went = not said or self._upstream.send(said) == len(said)
            if went and is_eof:
                self._upstream.shutdown(SHUT_WR)
        self._await_forwarded(len(said) + is_eof)

    def _await_forwarded(self, size: int) -> None:
        self._relay.loop.later(FORWARDED_CHECK_S, lambda: self._check_forwarded(size))

    def _check_forwarded(self, size: int) -> None:
        if self.is_over:
            return
        if self._relay.table.acknowledged(self.flow_id) < size:
            self._await_forwarded(size)
        else:
            self._replace_upstream()

    def _replace_upstream(self) -> None:
        """Put a socket with nothing to send in the upstream's place: it would repeat for ever what it hears no answer to."""
        upstream = self._upstream
        keeper = SocketType(upstream.family, SOCK_STREAM)
        local, remote = upstream.getsockname(), upstream.getpeername()
        self._relay.table.silence(keeper, self.flow_id)
        self.keepers = (cookie_of(keeper),)
        take_place(keeper, upstream, local, remote)


def _speaks_on(ends: int, counts: FlowCounts, since_ns: int) -> bool:
    """Whether every end that is said to have reset the flow has sent something else `since_ns`: then others said so."""
    seen = ((Ends.UP_RST, counts.client_seen_ns), (Ends.DOWN_RST, counts.server_seen_ns))
    return all(seen_ns > since_ns for bit, seen_ns in seen if ends & bit)


def take_place(keeper: SocketType, upstream: SocketType, local: SockAddr, remote: SockAddr) -> None:
    """Have `upstream`'s descriptor be a connection with the same names that was never spoken on (TCP_REPAIR)."""
    fall_silent(keeper)
    keeper.bind(local)
    fall_silent(upstream)
    os.dup2(keeper.fileno(), upstream.fileno(), inheritable=False)
    keeper.close()
    upstream.connect(remote)
