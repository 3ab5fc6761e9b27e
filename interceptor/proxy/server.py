"""The proxy: accepts captured connections, refuses what would loop, and ends in order. Bytes and rules are others' business."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from select import EPOLLIN
from socket import SocketType
from typing import TYPE_CHECKING, Literal

from interceptor.proxy import open_flows
from interceptor.proxy.acceptor import Acceptor
from interceptor.proxy.announce import Announcer
from interceptor.proxy.connection import Connection
from interceptor.proxy.dns.names import Names
from interceptor.proxy.dns.upstreams import parse_resolvers
from interceptor.proxy.flows import Flow
from interceptor.proxy.hooks import Hooks
from interceptor.proxy.identity import CAP_NET_ADMIN, become
from interceptor.proxy.limits import Limits
from interceptor.proxy.listeners import BoundListener, open_listeners
from interceptor.proxy.local_addresses import LocalAddresses
from interceptor.proxy.loop import Loop
from interceptor.proxy.metrics import Counts, Region
from interceptor.proxy.owners import Owners
from interceptor.proxy.relay.choice import open_relay
from interceptor.proxy.relay.packet import PacketRelay
from interceptor.proxy.relay.packet_table import FlowTable
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.session import Event
from interceptor.proxy.settings import ProxySettings
from interceptor.proxy.sweep import Sweep
from interceptor.proxy.udp import UdpRelay
from interceptor.proxy.upstream import OpenSocket

if TYPE_CHECKING:
    from interceptor.proxy.dns.datagrams import DnsDatagrams
    from interceptor.proxy.dns.resolver import Resolver
    from interceptor.proxy.dns.streams import DnsStreams

__all__ = ["Proxy", "open_listeners"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Proxy:
    """Serves `listeners` until told to stop. One thread; the one that calls `run`."""

    def __init__(
        self,
        settings: ProxySettings,
        listeners: list[BoundListener],
        on_flow: Callable[[Flow], None],
        open_socket: OpenSocket = SocketType,
        counts: Counts | None = None,
        names: Names | None = None,
        flow_table: FlowTable | None = None,
    ) -> None:
        self._loop = Loop()
        self._loop.on_wakeup = self._told_to_stop
        self._listeners = listeners
        self._settings = settings
        view = listeners[0].view
        relay = open_relay(settings.relay, self._loop, flow_table)
        local = LocalAddresses(view, self._loop)
        self._runtime = Runtime(
            settings, self._loop, view, relay, open_socket, on_flow, Owners(view), local, counts or Region().worker(0), names
        )
        self._sweep = Sweep(self._loop, settings, view.half_closed_timeout_s)
        self._limits = Limits(settings.max_connections, settings.max_connections_per_client)
        self._runtime.hooks = self._own_hooks()
        self._own_ports = settings.own_ports | {bound.listener.port for bound in listeners}
        self._acceptors: list[Acceptor] = []
        self._datagrams: list[UdpRelay | DnsDatagrams | DnsStreams] = []
        self._draining = False
        self._serving = False
        self._closed = threading.Event()
        self._resolver = self._own_resolver()

    @property
    def state(self) -> Literal["starting", "serving", "draining"]:
        """Where it is in its life. From any thread, as are `open_flows` and `stop`."""
        if self._draining or self._closed.is_set():
            return "draining"
        return "serving" if self._serving else "starting"

    def open_flows(self) -> Iterator[Flow]:
        """The open TCP connections as flow records so far, of reason `open`."""
        return (connection.flow_so_far() for connection in tuple(self._sweep.connections))

    @property
    def hooks(self) -> Hooks:
        """Where others put a hand in; to be set before `run`."""
        return self._runtime.hooks

    def later(self, delay_s: float, callback: Callable[[], None]) -> object:
        """Call `callback` in the proxy's thread, `delay_s` seconds from now. From that thread only."""
        return self._loop.later(delay_s, callback)

    def answer(self, asked: socket.socket) -> None:
        """Tell the open connections to whoever asks on `asked` (open_flows.py). To be called before `run`."""
        self._loop.watch(asked.fileno(), EPOLLIN, lambda _events: open_flows.answer(asked, self.open_flows()))

    def stop_at_end_of(self, lifeline: int) -> None:
        """Begin to drain when the pipe `lifeline` ends: whoever holds its other end is gone. To be called before `run`."""

        def ended(_events: int) -> None:
            self._loop.unwatch(lifeline)
            self._told_to_stop(b"")

        self._loop.watch(lifeline, EPOLLIN, ended)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop()` or, in the main thread, SIGTERM or SIGINT; then drain and give everything back.

        `on_ready` is called once signals are listened to and `run_as` is become, before the first connection is taken.
        Raises ProxyError when `run_as` cannot be become.
        """
        try:
            with self._signals():
                if self._settings.run_as is not None:
                    become(*self._settings.run_as, frozenset({CAP_NET_ADMIN} if self._settings.needs_net_admin else ()))
                if isinstance(self._runtime.relay, PacketRelay):
                    self._runtime.relay.serve(
                        self._listeners, self.hooks, self._runtime.counts, peeks=bool(self._settings.peek)
                    )
                for bound in self._listeners:
                    self._serve(bound)
                if isinstance(self._runtime.relay, PacketRelay):
                    self._adopt(self._runtime.relay)
                self._serving = True
                on_ready()
                self._loop.run()
        finally:
            self._close()

    def stop(self) -> None:
        """Begin to drain; a second call ends at once. From any thread."""
        if not self._closed.is_set():
            self._loop.wake()

    def _serve(self, bound: BoundListener) -> None:
        if bound.listener.direction == "dns":
            self._serve_dns(bound)
        elif bound.protocol == "tcp":
            self._acceptors.append(Acceptor(self._runtime, bound, self._own_ports, self._sweep, None))
        else:
            self._datagrams.append(UdpRelay(self._runtime, bound))

    def _serve_dns(self, bound: BoundListener) -> None:
        streams = self._answer_dns(bound, self._resolver) if self._resolver is not None else None
        if bound.protocol == "tcp":
            self._acceptors.append(Acceptor(self._runtime, bound, self._own_ports, self._sweep, streams))

    def _answer_dns(self, bound: BoundListener, resolver: Resolver) -> DnsStreams | None:
        # Loaded with the resolver: see _own_resolver.
        from interceptor.proxy.dns.datagrams import DnsDatagrams
        from interceptor.proxy.dns.streams import DnsStreams

        if bound.protocol == "udp":
            self._datagrams.append(DnsDatagrams(self._runtime, bound, resolver))
            return None
        streams = DnsStreams(self._runtime, bound.listener, resolver)
        self._datagrams.append(streams)
        return streams

    def _own_resolver(self) -> Resolver | None:
        addresses = parse_resolvers(self._settings.resolvers, self._own_ports, self._runtime.view.netlink.is_local)
        if not addresses or self._settings.dns_port is None:
            return None
        # Brings dnspython, 60 ms and 5 MB, for those alone who have DNS captured. serve.py has done it before the fork.
        from interceptor.proxy.dns.resolver import Resolver

        if self._runtime.names is None:
            self._runtime.names = Names()
        return Resolver(self._runtime, addresses, self._runtime.names)

    def _own_hooks(self) -> Hooks:
        header = self._settings.header
        return Hooks(
            admit=lambda _listener, client, _destination: self._limits.admit(client[0]),
            ended=lambda connection: self._limits.release(connection.client_address[0]),
            preface=Announcer(header) if header is not None else None,
        )

    def _adopt(self, relay: PacketRelay) -> None:
        """Go on with the flows of a proxy, or worker, that is gone."""
        by_direction = {acceptor.direction: acceptor for acceptor in self._acceptors}
        for adopted, resume in relay.adopt():
            acceptor = by_direction.get("inbound" if adopted.is_inbound else "outbound", self._acceptors[0])
            connection = Connection(acceptor, adopted.client, adopted.client_address, adopted.original_dst, adopted.began)
            acceptor.resume(connection)
            connection.resume(adopted.upstream, resume(connection))

    def _told_to_stop(self, _messages: bytes) -> None:
        if self._draining or not self._sweep.connections:
            self._end_now()
            return
        self._draining = True
        self._sweep.on_empty = self._loop.stop
        for acceptor in self._acceptors:
            acceptor.close()
        self._loop.later(self._settings.drain_deadline_s, self._end_now)

    def _end_now(self) -> None:
        if isinstance(self._runtime.relay, PacketRelay):
            self._runtime.relay.leave()
        for connection in tuple(self._sweep.connections):
            connection.feed(Event.DRAIN)
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
        if self._resolver is not None:
            self._resolver.close()
        for each in self._datagrams:
            each.close()
        for bound in self._listeners:
            bound.close()
        self._runtime.relay.close()
        self._runtime.view.close()
        self._loop.close()
