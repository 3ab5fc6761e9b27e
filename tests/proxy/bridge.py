"""Two loopback connections with a session and a relay between them, on a loop in a thread: the least a relay needs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from interceptor.proxy import closing
from interceptor.proxy.loop import Loop
from interceptor.proxy.relay.base import Relay, Running
from interceptor.proxy.session import (
    Accepted,
    Close,
    Eof,
    How,
    RelayFailed,
    Report,
    Session,
    ShutdownWrite,
    Side,
    UpstreamOpen,
)
from interceptor.sockets import Address

DEADLINE_S = 8.0
SOMEWHERE = Address(ip_address("127.0.0.1"), 1)


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
        self._session = Session()
        self.running: Running | None = None
        self._dead: Side | None = None
        self._loop.on_wakeup = lambda _: self._loop.stop()
        self._thread = threading.Thread(target=self._loop.run)

    def start(self) -> None:
        """Start relaying."""
        self._near.setblocking(False)
        self._far.setblocking(False)
        self._session.on(Accepted(SOMEWHERE, SOMEWHERE))
        self._session.on(UpstreamOpen())
        self.running = self._relay.start(self._near, self._far, self._edge)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and close everything."""
        if self._thread.is_alive():
            self._loop.wake()
            self._thread.join(DEADLINE_S)
        if self.running is not None:
            self.running.stop()
        self._loop.close()
        for sock in (self.client, self.server, self._near, self._far):
            sock.close()

    def wait(self) -> Report:
        """The report, once both sides are closed."""
        assert self.over.wait(DEADLINE_S), "the flow did not end"
        assert self.report is not None
        return self.report

    def _edge(self, edge: Eof | RelayFailed) -> None:
        if isinstance(edge, RelayFailed):
            self._dead = edge.side
        for command in self._session.on(edge):
            match command:
                case ShutdownWrite(side):
                    self._sock(side).shutdown(socket.SHUT_WR)
                case Close(side, how):
                    assert self.running is not None
                    self.running.stop()
                    self._close_side(side, how)
                case Report():
                    self.report = command
                    self.over.set()
                case _:
                    raise AssertionError(command)

    def _close_side(self, side: Side, how: How) -> None:
        if how is How.FIN:
            closing.finish(self._loop, self._sock(side))
        elif self._dead is side.other:
            closing.abort_after_delivery(self._loop, self._sock(side))
        else:
            closing.abort(self._loop, self._sock(side))

    def _sock(self, side: Side) -> socket.socket:
        return self._near if side is Side.CLIENT else self._far


@contextmanager
def bridged(make_relay: Callable[[Loop], Relay]) -> Iterator[Bridge]:
    """A bridge, not started; gone after the block."""
    bridge = Bridge(make_relay)
    try:
        yield bridge
    finally:
        bridge.close()
