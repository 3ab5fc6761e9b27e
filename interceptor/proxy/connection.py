"""One captured TCP connection: carries out what its session commands, and tells the session what happens.

All decisions are in `session`; all byte moving is in the relay.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from select import EPOLLOUT
from typing import assert_never

from interceptor.proxy import closing
from interceptor.proxy.flows import Flow, errno_name
from interceptor.proxy.loop import Scheduled
from interceptor.proxy.netlink import SocketOwner
from interceptor.proxy.owner import Process
from interceptor.proxy.relay.base import Running
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.session import (
    Accepted,
    Arm,
    Close,
    Command,
    Event,
    How,
    Idle,
    OpenUpstream,
    RelayFailed,
    Report,
    Session,
    ShutdownWrite,
    Side,
    StartRelay,
    State,
    Timer,
    UpstreamFailed,
    UpstreamOpen,
)
from interceptor.proxy.settings import Listener
from interceptor.proxy.upstream import UpstreamError
from interceptor.sockets import Address, address, pending_error


class Connection:
    """The two sockets of a flow, its session and its relay."""

    def __init__(
        self,
        runtime: Runtime,
        listener: Listener,
        client: socket.socket,
        client_address: Address,
        original_dst: Address,
        on_end: Callable[[Connection], None],
    ) -> None:
        self._runtime = runtime
        self._listener = listener
        self._client: socket.socket = client
        self._client_address = client_address
        self._original_dst = original_dst
        self._on_end = on_end
        self._session = Session()
        self._upstream: socket.socket | None = None
        self._upstream_local: Address | None = None
        self._running: Running | None = None
        self._timer: Scheduled | None = None
        self._dead_side: Side | None = None
        self._error: str | None = None
        self._owner: SocketOwner | None = None
        self._process: Process | None = None
        self._time = time.time()
        self._start = time.monotonic()

    def begin(self, destination: Address) -> None:
        """Dial `destination`: the original one, but for DNS the resolver."""
        # Until there is a relay, a client that gives up shows as an error or hang-up, which need no mask.
        self._runtime.loop.watch(self._client.fileno(), 0, self._client_gave_up)
        if self._listener.direction != "inbound":
            self._know_owner()
        self.feed(Accepted(self._client_address, destination))

    def feed(self, event: Event) -> None:
        """Tell the session of `event` and carry out what it answers."""
        if isinstance(event, RelayFailed):
            self._dead_side = event.side
        for command in self._session.on(event):
            self._execute(command)

    def _execute(self, command: Command) -> None:
        match command:
            case OpenUpstream(dst):
                self._open_upstream(dst or self._original_dst)
            case StartRelay():
                self._start_relay()
            case ShutdownWrite(side):
                self._shutdown_write(side)
            case Close(side, how):
                self._close(side, how)
            case Arm(timer):
                self._arm(timer)
            case Report():
                self._report(command)
            case _:
                assert_never(command)

    def _open_upstream(self, destination: Address) -> None:
        try:
            self._upstream = self._runtime.dial(socket.SOCK_STREAM, self._listener.direction, self._client_address, destination)
        except UpstreamError as error:
            self._error = str(error)
            self.feed(UpstreamFailed(error.errno))
            return
        self._runtime.loop.watch(self._upstream.fileno(), EPOLLOUT, self._upstream_ready)

    def _upstream_ready(self, _events: int) -> None:
        if self._upstream is None:
            return
        number = pending_error(self._upstream)
        if not number:
            self._upstream_local = address(self._upstream.getsockname())
            try:
                peer = address(self._upstream.getpeername())
            except OSError:
                peer = None  # reset since: the relay is about to hear of it
            if self._upstream_local == peer:
                # TCP's simultaneous open lets a socket connect to itself when its port was picked as its own destination.
                number = errno.ECONNREFUSED
        if number:
            self._error = f"connect: {errno_name(number)}"
            self.feed(UpstreamFailed(number))
            return
        if self._listener.direction == "inbound":
            self._know_owner()
        self.feed(UpstreamOpen())

    def _client_gave_up(self, _events: int) -> None:
        self.feed(RelayFailed(Side.CLIENT, pending_error(self._client) or errno.ECONNRESET))

    def _start_relay(self) -> None:
        if self._upstream is None:
            return
        self._runtime.loop.unwatch(self._client.fileno())
        self._runtime.loop.unwatch(self._upstream.fileno())
        self._running = self._runtime.relay.start(self._client, self._upstream, self.feed)

    def _shutdown_write(self, side: Side) -> None:
        sock = self._client if side is Side.CLIENT else self._upstream
        if sock is None:
            return
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            # Reset meanwhile: the relay is about to report it.
            if error.errno != errno.ENOTCONN:
                raise

    def _close(self, side: Side, how: How) -> None:
        if self._running is not None:
            self._running.stop()
        sock = self._client if side is Side.CLIENT else self._upstream
        if sock is None:
            return
        loop = self._runtime.loop
        if how is How.FIN:
            closing.finish(loop, sock)
        elif self._dead_side is side.other:
            closing.abort_after_delivery(loop, sock)
        else:
            closing.abort(loop, sock)

    def _arm(self, timer: Timer) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        settings = self._runtime.settings
        if timer is Timer.CONNECT:
            self._timer = self._runtime.loop.later(settings.connect_timeout_s, lambda: self.feed(Idle()))
        elif settings.idle_timeout_s is not None:
            self._watch_idleness(settings.idle_timeout_s, -1)

    def _watch_idleness(self, timeout_s: float, moved_before: int) -> None:
        # Comparing counts when the time is up costs nothing while bytes move; a flow may be idle for up to twice the timeout.
        moved = self._moved()
        if moved == moved_before:
            self.feed(Idle())
        else:
            self._timer = self._runtime.loop.later(timeout_s, lambda: self._watch_idleness(timeout_s, moved))

    def _moved(self) -> int:
        return self._running.sent + self._running.received if self._running is not None else 0

    def _know_owner(self) -> None:
        # uid and inode now, since a short-lived client is gone when the flow ends; the search in /proc after the batch.
        view = self._runtime.view
        try:
            if self._listener.direction == "inbound":
                self._owner = view.netlink.listener_owner(socket.IPPROTO_TCP, self._original_dst)
            else:
                # The client's own view: only NAT lets it believe that it talks to the original destination.
                rewritten = self._listener.mode == "connect"
                remote = address(self._client.getsockname()) if rewritten else self._original_dst
                self._owner = view.netlink.owner(socket.IPPROTO_TCP, self._client_address, remote)
        except OSError:
            return  # stays unknown, and says so
        if self._owner is not None:
            self._runtime.loop.later(0.0, self._find_process)

    def _find_process(self) -> None:
        if self._owner is None or self._session.state is State.CLOSED:
            return
        try:
            self._process = self._runtime.view.finder.find(self._owner.inode)
        except OSError:
            return  # out of descriptors: stays unknown

    def _report(self, report: Report) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._error is None and report.errno is not None:
            self._error = errno_name(report.errno)
        self._runtime.record(
            Flow(
                time=self._time,
                protocol="tcp",
                direction=self._listener.direction,
                listener=self._listener,
                client=self._client_address,
                original_dst=self._original_dst,
                upstream_local=self._upstream_local,
                sent=self._running.sent if self._running else 0,
                received=self._running.received if self._running else 0,
                duration_ms=(time.monotonic() - self._start) * 1000,
                reason=report.reason.value,
                error=self._error,
                uid=self._owner.uid if self._owner else None,
                pid=self._process.pid if self._process else None,
                command=self._process.command if self._process else None,
            )
        )
        self._on_end(self)
