"""Two loopback connections with a session and a relay between them, on a loop in a thread: the least a relay needs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from interceptor.proxy import closing
from interceptor.proxy.loop import Loop
from interceptor.proxy.relay.base import Relay, Running
from interceptor.proxy.session import Command, Event, Reason, State, advance

DEADLINE_S = 8.0


@dataclass(frozen=True)
class Report:
    """How the flow ended."""

    reason: Reason | None
    errno: int


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one loopback connection: who dialled, who accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    dialled.settimeout(DEADLINE_S)
    accepted.settimeout(DEADLINE_S)
    return dialled, accepted


class Bridge:
    """`client` and `server` are the applications' ends; the relay sits between their peers."""

    def __init__(self, make_relay: Callable[[Loop], Relay]) -> None:
        self.client, self._near = tcp_pair()
        self._far, self.server = tcp_pair()
        self.report: Report | None = None
        self.over = threading.Event()
        self._loop = Loop()
        self._relay = make_relay(self._loop)
        self._state = State.RELAYING
        self.running: Running | None = None
        self.counts = (0, 0)
        self._dead: Event | None = None
        self._loop.on_wakeup = lambda _: self._loop.stop()
        self._thread = threading.Thread(target=self._loop.run)

    def start(self, first: bytes = b"") -> None:
        """Start relaying."""
        self._near.setblocking(False)
        self._far.setblocking(False)
        self.running = self._relay.join(self._near, self._far, self)
        # In the loop's thread: it may report edges at once.
        self._loop.postpone(lambda: self.running and self.running.start(first))
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and close everything."""
        if self._thread.is_alive():
            self._loop.wake()
            self._thread.join(DEADLINE_S)
        if self.running is not None:
            self.running.stop()
        self._relay.close()
        self._loop.close()
        for sock in (self.client, self.server, self._near, self._far):
            sock.close()

    def wait(self) -> Report:
        """The report, once both sides are closed."""
        assert self.over.wait(DEADLINE_S), "the flow did not end"
        assert self.report is not None
        return self.report

    def feed(self, event: Event, number: int = 0) -> None:
        """See Edges."""
        assert self.running is not None
        if event in (Event.CLIENT_FAILED, Event.UPSTREAM_FAILED):
            self._dead = event
        self._state, commands, reason = advance(self._state, event)
        for command in commands:
            match command:
                case Command.END_CLIENT:
                    self._near.shutdown(socket.SHUT_WR)
                case Command.END_UPSTREAM:
                    self._far.shutdown(socket.SHUT_WR)
                case Command.FINISH | Command.RESET:
                    self.running.stop()
                    self._close(self._near, command, self._dead is Event.UPSTREAM_FAILED)
                    self._close(self._far, command, self._dead is Event.CLIENT_FAILED)
                case Command.REPORT:
                    self.report = Report(reason, number)
                    self.over.set()
                case _:
                    raise AssertionError(command)

    def _close(self, sock: socket.socket, how: Command, after_delivery: bool) -> None:
        if how is Command.FINISH:
            self._loop.dispose(sock)
        elif after_delivery:
            closing.abort_after_delivery(self._loop, sock)
        else:
            closing.abort(self._loop, sock)


@contextmanager
def bridged(make_relay: Callable[[Loop], Relay]) -> Iterator[Bridge]:
    """A bridge, not started; gone after the block."""
    bridge = Bridge(make_relay)
    try:
        yield bridge
    finally:
        bridge.close()
