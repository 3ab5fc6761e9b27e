"""One captured TCP connection: carries out what the session table commands, and tells it what happens.

All decisions are in `session`; all byte moving is in the relay; time limits are kept by `sweep`, from `state` and `moved`.
"""

from __future__ import annotations

import errno
import time
from functools import partial
from select import EPOLLERR, EPOLLHUP, EPOLLOUT
from socket import MSG_PEEK, SocketType
from typing import TYPE_CHECKING

from interceptor.proxy import closing
from interceptor.proxy.flows import Flow, errno_name
from interceptor.proxy.hooks import HEARD_SIZE
from interceptor.proxy.loop import STREAM
from interceptor.proxy.owners import one
from interceptor.proxy.peek import NOTHING, Names, Peek
from interceptor.proxy.relay.base import Running
from interceptor.proxy.session import TRANSITIONS, Command, Event, IllegalEvent, Reason, State
from interceptor.proxy.upstream import UpstreamError, connect, connect_error
from interceptor.sockets import SockAddr, normal, pending_error

if TYPE_CHECKING:
    from interceptor.proxy.acceptor import Acceptor
    from interceptor.proxy.netlink import SocketOwner
    from interceptor.proxy.owner import Process
    from interceptor.proxy.settings import Direction

TROUBLE = EPOLLERR | EPOLLHUP

# Members of an enum are looked up at every use (Python 3.11): these are used for every connection.
ACCEPTED, ACCEPTED_UNHEARD, UPSTREAM_OPEN = Event.ACCEPTED, Event.ACCEPTED_UNHEARD, Event.UPSTREAM_OPEN
CLIENT_FAILED, UPSTREAM_FAILED = Event.CLIENT_FAILED, Event.UPSTREAM_FAILED
NEW, CLOSED = State.NEW, State.CLOSED


class Connection:
    """The two sockets of a flow, its state and its relay. Thousands may wait: only slots, nothing made twice."""

    __slots__ = (
        "_acceptor",
        "_broken",
        "_connect_s",
        "_counted_received",
        "_counted_sent",
        "_dialled_at",
        "_dns_name",
        "_error",
        "_first",
        "_peek",
        "_process",
        "_reason",
        "_uid",
        "_upstream_events",
        "_upstream_local",
        "client",
        "client_address",
        "is_kept_tracked",
        "lasts",
        "moved_at",
        "moved_before",
        "names",
        "original_dst",
        "running",
        "start",
        "state",
        "upstream",
    )

    def __init__(
        self, acceptor: Acceptor, client: SocketType, client_address: SockAddr, original_dst: SockAddr, start: float
    ) -> None:
        self._acceptor = acceptor
        self.client = client
        self.client_address = client_address
        self.original_dst = original_dst
        self.start = start  # time.monotonic()
        self.state = NEW
        self._dns_name: str | None = None
        self._dialled_at = start
        self._connect_s: float | None = None
        self.names = NOTHING  # what the client wrote first, if that was looked at
        self._peek: Peek | None = None
        self._upstream_events = 0  # told while there is no relay yet that could be told
        self._counted_sent = self._counted_received = 0
        self.upstream: SocketType | None = None
        self.running: Running | None = None
        self._upstream_local: SockAddr | None = None
        self._uid: int | None = None  # of who opened the client's socket, or of the application
        self._process: Process | None = None
        self._first = b""
        self._broken: Event | None = None
        self._error: str | None = None
        self._reason = Reason.CLOSED
        # The sweep's notes: byte count at its last look, since when that has not changed, whether keepalive is on.
        self.moved_before = -1
        self.moved_at = start
        self.lasts = False
        self.is_kept_tracked = False

    @property
    def direction(self) -> Direction:
        """Seen from the pod."""
        return self._acceptor.direction

    def begin(self) -> None:
        """Dial the original destination, or listen to the client first."""
        runtime = self._acceptor.runtime
        if self._acceptor.direction != "inbound":
            self._know_owner()
            # Now: by the end of a long connection, the name may be forgotten or the address another's.
            if runtime.names is not None:
                self._dns_name = runtime.names.name_of(self.original_dst[0])
        self.feed(ACCEPTED if runtime.hooks.hear is None else ACCEPTED_UNHEARD)

    def resume(self, upstream: SocketType, running: Running) -> None:
        """Go on with a flow that is relayed already."""
        self.upstream = upstream
        self.running = running
        self._upstream_local = upstream.getsockname()
        self.state = State.RELAYING

    def feed(self, event: Event, number: int = 0) -> None:
        """Tell the session of `event` and carry out what it answers. `number` is a failure's errno."""
        try:
            state, commands, reason = CARRY_OUT[self.state][event]
        except KeyError:
            raise IllegalEvent(self.state, event) from None
        self.state = state
        if reason is not None:
            self._note_end(event, reason, number)
        for carry_out in commands:
            carry_out(self)

    def _note_end(self, event: Event, reason: Reason, number: int) -> None:
        self._reason = reason
        if event is CLIENT_FAILED or event is UPSTREAM_FAILED:
            self._broken = event
        if number and self._error is None:
            self._error = errno_name(number)

    def count_moved(self) -> None:
        """Count the bytes that were moved since this was last called."""
        running = self.running
        if running is not None:
            sent, received = running.sent, running.received
            self._acceptor.counts.moved(sent - self._counted_sent, received - self._counted_received)
            self._counted_sent, self._counted_received = sent, received

    def watch_client(self) -> None:
        """Notice a client that gives up before there is a relay. Most upstreams open before that is worth its cost."""
        loop = self._acceptor.runtime.loop
        if not loop.is_watched(self.client.fileno()):
            loop.watch_arrivals(self.client.fileno(), self._client_ready)

    def _listen(self) -> None:
        self.watch_client()
        self._hear()

    def _hear(self) -> None:
        hear = self._acceptor.runtime.hooks.hear
        try:
            said = self.client.recv(HEARD_SIZE, MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            self.feed(CLIENT_FAILED, error.errno or errno.EIO)
            return
        if not said or hear is None or hear(self, said):
            self.feed(Event.HEARD)

    def _client_ready(self, events: int) -> None:
        if events & TROUBLE:
            self.feed(CLIENT_FAILED, pending_error(self.client) or errno.ECONNRESET)
        elif self.state is State.LISTENING:
            self._hear()
        elif self._peek is not None:
            self._peek.client_ready()

    def _dial(self) -> None:
        acceptor = self._acceptor
        runtime = acceptor.runtime
        self._dialled_at = time.monotonic()
        try:
            upstream = runtime.open_upstream(acceptor.direction, self.client_address, self.original_dst)
            self._first = runtime.relay.prepare(self.client, upstream)
            connect(upstream, self.original_dst)
        except UpstreamError as error:
            self._error = str(error)
            self.feed(Event.UPSTREAM_REFUSED)
            return
        self.upstream = upstream
        runtime.loop.watch(upstream.fileno(), STREAM, self._upstream_ready)

    def _upstream_ready(self, events: int) -> None:
        upstream = self.upstream
        if upstream is None:
            return
        if self._peek is not None:
            self._upstream_events |= events
            if events & ~EPOLLOUT:
                self._peek.upstream_ready()
            return
        number = 0
        if events & TROUBLE:
            number = connect_error(upstream)
        elif not events & EPOLLOUT:
            return
        if not number:
            self._upstream_local = normal(upstream.getsockname())
            if self._upstream_local == self.original_dst:
                # TCP's simultaneous open lets a socket connect to itself when its port was picked as its own destination.
                number = errno.ECONNREFUSED
        if number:
            self._error = f"connect: {errno_name(number)}"
            self.feed(Event.UPSTREAM_REFUSED)
            return
        acceptor = self._acceptor
        if acceptor.direction == "inbound":
            self._know_owner()
        now = time.monotonic()
        self._connect_s = now - self._dialled_at
        self._dialled_at = self.start  # a number less to keep
        acceptor.counts.connected(self._connect_s, now - self.start)
        opened = acceptor.runtime.hooks.opened
        if opened is not None:
            opened(self)
        self.feed(UPSTREAM_OPEN)
        if events != EPOLLOUT:
            # To the relay; or, when the client's first bytes are looked at before there is one, to ourselves.
            acceptor.runtime.loop.tell(upstream.fileno(), events)

    def _start_relay(self) -> None:
        settings = self._acceptor.runtime.settings
        if not settings.peek:
            self._relay()
            return
        peek = Peek(self.client, settings.peek, self._acceptor.runtime.loop.later, self._first)
        names = peek.start(self._names_known)
        if names is None:
            self._peek = peek
            self.watch_client()
        else:
            self.names = names
            self._relay()

    def _names_known(self, names: Names) -> None:
        self._peek = None
        self.names = names
        self._relay()
        events, self._upstream_events = self._upstream_events, 0
        if events and self.upstream is not None:
            self._acceptor.runtime.loop.tell(self.upstream.fileno(), events)

    def _relay(self) -> None:
        assert self.upstream is not None
        runtime = self._acceptor.runtime
        preface = runtime.hooks.preface
        self.running = running = runtime.relay.join(self.client, self.upstream, self)
        self._acceptor.counts.relaying(running.name)
        first, self._first = self._first, b""
        running.start(first if preface is None else preface(self) + first)

    def _end_client(self) -> None:
        assert self.running is not None
        if self.running.asks_peers:
            closing.end_stream(self.client)

    def _end_upstream(self) -> None:
        assert self.upstream is not None
        assert self.running is not None
        # A packet relay's peers have each other's FIN already; ours would be sent, and sent again, to nobody.
        if self.running.asks_peers:
            closing.end_stream(self.upstream)

    def _finish(self) -> None:
        assert self.upstream is not None
        assert self.running is not None
        loop = self._acceptor.runtime.loop
        self.running.stop()
        loop.dispose(self.client)
        loop.dispose(self.upstream)

    def _reset(self) -> None:
        loop = self._acceptor.runtime.loop
        if self._peek is not None:
            self._peek.stop()
            self._peek = None
        if self.running is not None:
            self.running.stop()
        else:
            self._acceptor.runtime.relay.abandon(self.client)
        # The side that is not broken gets what the other had sent; whichever we break ourselves does not.
        for sock, its_failure in ((self.client, CLIENT_FAILED), (self.upstream, UPSTREAM_FAILED)):
            if sock is None:
                continue
            if self._broken is None or self._broken is its_failure:
                closing.abort(loop, sock)
            else:
                closing.abort_after_delivery(loop, sock)

    def _know_owner(self) -> None:
        # uid and inode now, since a short-lived client is gone when the flow ends; the search in /proc after the batch.
        runtime = self._acceptor.runtime
        owners = runtime.owners
        if not owners.credit and not owners.renewed(self.start):
            self._acceptor.counts.owner_skipped()
            return
        if self._acceptor.direction == "inbound":
            owner = owners.of_application(self.original_dst)
        else:
            # The client's own view: only NAT lets it believe that it talks to the original destination.
            rewritten = self._acceptor.listener.mode == "connect"
            remote = normal(self.client.getsockname()) if rewritten else self.original_dst
            owner = owners.of_client(self.client_address, remote)
        if owner is None:
            return
        self._uid = one(owner.uid)
        if owners.may_search(self.start):
            runtime.loop.postpone(partial(self._find_process, owner))

    def _find_process(self, owner: SocketOwner) -> None:
        if self.state is not CLOSED:
            self._process = self._acceptor.runtime.owners.process(owner)

    def flow_so_far(self) -> Flow:
        """The record of a connection that is still open. From any thread: it changes nothing."""
        running = self.running
        sent, received = (running.sent, running.received) if running is not None else (0, 0)
        now = time.monotonic()
        return self._flow("open", now, now - self.start, sent, received)

    def _report(self) -> None:
        acceptor, running = self._acceptor, self.running
        now, reason = time.monotonic(), self._reason.text
        duration_s, sent, received = now - self.start, 0, 0
        if running is not None:
            ended_at = running.ended_at
            if ended_at is not None:
                duration_s = ended_at - self.start
            sent, received = running.sent, running.received
            acceptor.counts.relayed(running.name, sent - self._counted_sent, received - self._counted_received)
        acceptor.counts.closed(reason, duration_s)
        acceptor.runtime.record(self._flow(reason, now, duration_s, sent, received))
        self.running = None
        acceptor.ended(self)

    def _flow(self, reason: str, now: float, duration_s: float, sent: int, received: int) -> Flow:
        acceptor, running, process, names = self._acceptor, self.running, self._process, self.names
        return Flow(
            time.time() - now + self.start,
            "tcp",
            acceptor.direction,
            acceptor.listener,
            self.client_address,
            self.original_dst,
            self._upstream_local,
            sent,
            received,
            duration_s * 1000,
            reason,
            self._error,
            self._uid,
            process.pid if process is not None else None,
            process.command if process is not None else None,
            running.name if running is not None else None,
            None if self._connect_s is None else self._connect_s * 1000,
            None,
            names.sni,
            names.alpn,
            names.host,
            self._dns_name,
        )


_BY_COMMAND = {
    Command.LISTEN: Connection._listen,  # noqa: SLF001 - the class's own
    Command.DIAL: Connection._dial,  # noqa: SLF001
    Command.START_RELAY: Connection._start_relay,  # noqa: SLF001
    Command.END_CLIENT: Connection._end_client,  # noqa: SLF001
    Command.END_UPSTREAM: Connection._end_upstream,  # noqa: SLF001
    Command.FINISH: Connection._finish,  # noqa: SLF001
    Command.RESET: Connection._reset,  # noqa: SLF001
    Command.REPORT: Connection._report,  # noqa: SLF001
}
# The session's table with the commands looked up.
CARRY_OUT = {
    state: {
        event: (after, tuple(_BY_COMMAND[command] for command in commands), reason)
        for event, (after, commands, reason) in transitions.items()
    }
    for state, transitions in TRANSITIONS.items()
}
