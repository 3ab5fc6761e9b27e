"""One captured TCP connection: carries out what the session table commands, and tells it what happens.

All decisions are in `session`; all byte moving is in the relay; time limits are kept by `sweep`, from `state` and `moved`.
"""

from __future__ import annotations

import errno
import time
from select import EPOLLERR, EPOLLHUP, EPOLLOUT
from socket import MSG_PEEK, SHUT_WR, SocketType
from typing import TYPE_CHECKING

from interceptor.proxy import closing
from interceptor.proxy.flows import Flow, errno_name
from interceptor.proxy.hooks import HEARD_SIZE
from interceptor.proxy.loop import STREAM
from interceptor.proxy.relay.base import Running
from interceptor.proxy.session import TRANSITIONS, Command, Event, IllegalEvent, Reason, State
from interceptor.proxy.upstream import UpstreamError, connect
from interceptor.sockets import SockAddr, pending_error

if TYPE_CHECKING:
    from interceptor.proxy.acceptor import Acceptor
    from interceptor.proxy.netlink import SocketOwner
    from interceptor.proxy.owner import Process

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
        "_destination",
        "_error",
        "_first",
        "_owner",
        "_process",
        "_reason",
        "_upstream_local",
        "client",
        "client_address",
        "lasts",
        "moved_at",
        "moved_before",
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
        self._destination = original_dst
        self.state = NEW
        self.upstream: SocketType | None = None
        self.running: Running | None = None
        self._upstream_local: SockAddr | None = None
        self._owner: SocketOwner | None = None
        self._process: Process | None = None
        self._first = b""
        self._broken: Event | None = None
        self._error: str | None = None
        self._reason = Reason.CLOSED
        # The sweep's notes: byte count at its last look, since when that has not changed, whether keepalive is on.
        self.moved_before = -1
        self.moved_at = start
        self.lasts = False

    def begin(self, destination: SockAddr) -> None:
        """Dial `destination`: the original one, but for DNS the resolver."""
        self._destination = destination
        runtime = self._acceptor.runtime
        if self._acceptor.direction != "inbound":
            self._know_owner()
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
            state, commands, reason = TRANSITIONS[self.state][event]
        except KeyError:
            raise IllegalEvent(self.state, event) from None
        if reason is not None:
            self._reason = reason
            if event is CLIENT_FAILED or event is UPSTREAM_FAILED:
                self._broken = event
            if number and self._error is None:
                self._error = errno_name(number)
        self.state = state
        for command in commands:
            CARRY_OUT[command](self)

    def watch_client(self) -> None:
        """Notice a client that gives up before there is a relay. Most upstreams open before that is worth its cost."""
        loop = self._acceptor.runtime.loop
        if not loop.is_watched(self.client.fileno()):
            loop.watch(self.client.fileno(), STREAM, self._client_ready)

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

    def _dial(self) -> None:
        acceptor = self._acceptor
        runtime = acceptor.runtime
        try:
            upstream = runtime.open_upstream(acceptor.direction, self.client_address, self._destination)
            self._first = runtime.relay.prepare(self.client, upstream)
            connect(upstream, self._destination)
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
        number = 0
        if events & TROUBLE:
            number = _connect_error(upstream)
        elif not events & EPOLLOUT:
            return
        if not number:
            self._upstream_local = upstream.getsockname()
            if self._upstream_local == self._destination:
                # TCP's simultaneous open lets a socket connect to itself when its port was picked as its own destination.
                number = errno.ECONNREFUSED
        if number:
            self._error = f"connect: {errno_name(number)}"
            self.feed(Event.UPSTREAM_REFUSED)
            return
        acceptor = self._acceptor
        if acceptor.direction == "inbound":
            self._know_owner()
        opened = acceptor.runtime.hooks.opened
        if opened is not None:
            opened(self)
        self.feed(UPSTREAM_OPEN)
        if events != EPOLLOUT:
            acceptor.runtime.loop.tell(upstream.fileno(), events)

    def _start_relay(self) -> None:
        assert self.upstream is not None
        runtime = self._acceptor.runtime
        preface = runtime.hooks.preface
        self.running = running = runtime.relay.join(self.client, self.upstream, self)
        first, self._first = self._first, b""
        running.start(first if preface is None else preface(self) + first)

    def _end_client(self) -> None:
        _shut_down(self.client)

    def _end_upstream(self) -> None:
        assert self.upstream is not None
        _shut_down(self.upstream)

    def _finish(self) -> None:
        assert self.upstream is not None
        assert self.running is not None
        loop = self._acceptor.runtime.loop
        self.running.stop()
        loop.dispose(self.client)
        loop.dispose(self.upstream)

    def _reset(self) -> None:
        loop = self._acceptor.runtime.loop
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
            runtime.counters.owners_skipped += 1
            return
        if self._acceptor.direction == "inbound":
            self._owner = owners.of_application(self.original_dst)
        else:
            self._owner = owners.of_client(self.client_address, self.original_dst)
        if self._owner is not None and owners.may_search(self.start):
            runtime.loop.postpone(self._find_process)

    def _find_process(self) -> None:
        if self._owner is not None and self.state is not CLOSED:
            self._process = self._acceptor.runtime.owners.process(self._owner)

    def _report(self) -> None:
        acceptor, running, owner, process = self._acceptor, self.running, self._owner, self._process
        runtime = acceptor.runtime
        now = time.monotonic()
        ended_at = running.ended_at if running is not None else None
        duration_s = (now if ended_at is None else ended_at) - self.start
        runtime.record(
            Flow(
                time.time() - (now - self.start),
                "tcp",
                acceptor.direction,
                acceptor.listener,
                self.client_address,
                self.original_dst,
                self._upstream_local,
                running.sent if running is not None else 0,
                running.received if running is not None else 0,
                duration_s * 1000,
                self._reason.value,
                self._error,
                owner.uid if owner is not None else None,
                process.pid if process is not None else None,
                process.command if process is not None else None,
                running.name if running is not None else None,
            )
        )
        self.running = None
        acceptor.ended(self)


def _connect_error(upstream: SocketType) -> int:
    """Why a connection that is in trouble was never there; 0 when it was, and broke since.

    A server that greets and resets at once was there: its greeting waits, and the client would have had it without us.
    Peeking does not take the error from behind the bytes, as SO_ERROR would.
    """
    try:
        upstream.recv(1, MSG_PEEK)
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _shut_down(sock: SocketType) -> None:
    try:
        sock.shutdown(SHUT_WR)
    except OSError as error:
        # Reset meanwhile: the relay is about to report it.
        if error.errno != errno.ENOTCONN:
            raise


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
CARRY_OUT = tuple(_BY_COMMAND[command] for command in Command)
