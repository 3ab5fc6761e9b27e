"""The proxy: accepts captured connections, refuses what would loop, and ends in order. Bytes and rules are others' business."""

from __future__ import annotations

import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from select import EPOLLIN

from interceptor.proxy import closing
from interceptor.proxy.connection import Connection
from interceptor.proxy.dns import DnsForwarder, parse_resolver
from interceptor.proxy.flows import Counters, Flow, errno_name
from interceptor.proxy.identity import CAP_NET_ADMIN, become
from interceptor.proxy.listeners import BoundListener, open_listeners
from interceptor.proxy.loop import Loop
from interceptor.proxy.original_dst import NoOriginalDst, original_dst, refuse_loop
from interceptor.proxy.probe import ProbeAnswer
from interceptor.proxy.relay.copy import CopyRelay
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.session import Drain
from interceptor.proxy.settings import ProxySettings
from interceptor.proxy.udp import UdpRelay
from interceptor.proxy.upstream import OpenSocket
from interceptor.sockets import Address, address

__all__ = ["Proxy", "open_listeners"]

# accept() says these when the host, not the client, has a problem (trio's ACCEPT_CAPACITY_ERRNOS): asking again at once
# would spin, for the listener stays readable.
ACCEPT_CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
ACCEPT_PAUSE_S = 0.1  # trio's
# Connections taken in one go, so that a flood of new ones does not starve those that run.
ACCEPT_BATCH = 64
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Proxy:
    """Serves `listeners` until told to stop. One thread; the one that calls `run`."""

    def __init__(
        self,
        settings: ProxySettings,
        listeners: list[BoundListener],
        on_flow: Callable[[Flow], None],
        open_socket: OpenSocket = socket.socket,
    ) -> None:
        self._loop = Loop()
        self._loop.on_wakeup = self._told_to_stop
        self._listeners = listeners
        self._settings = settings
        self._runtime = Runtime(settings, self._loop, listeners[0].view, CopyRelay(self._loop), open_socket, on_flow)
        self._own_ports = settings.own_ports | {bound.listener.port for bound in listeners}
        self._connections: set[Connection] = set()
        self._datagrams: list[UdpRelay | DnsForwarder] = []
        self._draining = False
        self._closed = threading.Event()
        self._resolver = parse_resolver(settings.resolvers[0]) if settings.resolvers else None

    @property
    def counters(self) -> Counters:
        """What was counted so far."""
        return self._runtime.counters

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop()` or, in the main thread, SIGTERM or SIGINT; then drain and give everything back.

        `on_ready` is called once signals are listened to and `run_as` is become, before the first connection is taken.
        Raises ProxyError when `run_as` cannot be become.
        """
        try:
            with self._signals():
                if self._settings.run_as is not None:
                    become(*self._settings.run_as, frozenset({CAP_NET_ADMIN} if self._settings.needs_net_admin else ()))
                for bound in self._listeners:
                    self._serve(bound)
                on_ready()
                self._loop.run()
        finally:
            self._close()

    def stop(self) -> None:
        """Begin to drain; a second call ends at once. From any thread."""
        if not self._closed.is_set():
            self._loop.wake()

    def _serve(self, bound: BoundListener) -> None:
        if bound.protocol == "tcp":
            self._loop.watch(bound.sock.fileno(), EPOLLIN, lambda _events: self._accept(bound))
        elif bound.listener.direction == "dns":
            if self._resolver is not None:
                self._datagrams.append(DnsForwarder(self._runtime, bound, self._resolver))
        else:
            self._datagrams.append(UdpRelay(self._runtime, bound))

    def _accept(self, bound: BoundListener) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                sock, sockaddr = bound.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self.counters.accept_errors[errno_name(error.errno or 0)] += 1
                if error.errno in ACCEPT_CAPACITY_ERRNOS:
                    self._pause(bound)
                    return
                continue  # the client's problem, ECONNABORTED and the like (accept(2)): the next one may be well
            sock.setblocking(False)
            self._take(bound, sock, address(sockaddr))

    def _pause(self, bound: BoundListener) -> None:
        self._loop.change(bound.sock.fileno(), 0)
        self._loop.later(ACCEPT_PAUSE_S, lambda: self._resume(bound))

    def _resume(self, bound: BoundListener) -> None:
        if not self._draining:
            self._loop.change(bound.sock.fileno(), EPOLLIN)

    def _take(self, bound: BoundListener, sock: socket.socket, client: Address) -> None:
        self.counters.accepted += 1
        destination: Address | None = None
        try:
            destination = original_dst(sock, bound.listener.mode, bound.originals)
            refuse_loop(destination, self._own_ports, bound.view.netlink.is_local)
        except NoOriginalDst as error:
            self._refuse(bound, sock, client, destination, error.reason, str(error))
            return
        except OSError as error:
            self._refuse(bound, sock, client, destination, NoOriginalDst.reason, errno_name(error.errno or 0))
            return
        if destination.port == self._settings.probe_port:
            ProbeAnswer(self._loop, sock, bound.listener, client, destination)
            return
        if bound.listener.direction == "dns" and self._resolver is None:
            self._refuse(bound, sock, client, destination, "no_resolver", None)
            return
        connection = Connection(self._runtime, bound.listener, sock, client, destination, self._ended)
        self._connections.add(connection)
        self.counters.open += 1
        dial = self._resolver if bound.listener.direction == "dns" and self._resolver is not None else destination
        connection.begin(dial)

    def _refuse(
        self, bound: BoundListener, sock: socket.socket, client: Address, to: Address | None, reason: str, error: str | None
    ) -> None:
        self.counters.refused[reason] += 1
        closing.abort(self._loop, sock)
        listener = bound.listener
        self._runtime.record(
            Flow(time.time(), "tcp", listener.direction, listener, client, to, None, 0, 0, 0.0, f"refused_{reason}", error)
        )

    def _ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self.counters.open -= 1
        if self._draining and not self._connections:
            self._loop.stop()

    def _told_to_stop(self, _messages: bytes) -> None:
        if self._draining or not self._connections:
            self._end_now()
            return
        self._draining = True
        for bound in self._listeners:
            if bound.protocol == "tcp":
                self._loop.dispose(bound.sock)
        self._loop.later(self._settings.drain_deadline_s, self._end_now)

    def _end_now(self) -> None:
        for connection in list(self._connections):
            connection.feed(Drain())
        self._loop.stop()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        # Signals can be had by the main thread alone; elsewhere the caller stops us.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # With a wakeup descriptor the loop hears of the signal; the handler itself has nothing to do.
        descriptor = signal.set_wakeup_fd(self._loop.wake_write, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda _number, _frame: None) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)

    def _close(self) -> None:
        self._closed.set()
        for each in self._datagrams:
            each.close()
        for bound in self._listeners:
            bound.close()
        self._runtime.view.close()
        self._loop.close()
