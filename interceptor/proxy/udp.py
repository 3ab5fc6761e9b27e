"""Relay captured UDP (TPROXY), replies from the original destination. Parses no payload.

Outbound, the half towards the client is a transparent socket bound to the original destination and connected to the client:
replies leave with the source the application expects, and the flow's later datagrams may come in there, past the listener.
Inbound that address is the application's own, and taken: replies leave by the listener's raw socket (raw_udp.py).
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from select import EPOLLIN
from typing import TypeAlias

from interceptor.errors import NetnsError
from interceptor.proxy.flows import Flow, errno_name
from interceptor.proxy.listeners import BoundListener
from interceptor.proxy.loop import Scheduled
from interceptor.proxy.metrics import RECEIVED, REFUSED, SENT, UDP_CLOSED, UDP_OPENED
from interceptor.proxy.netlink import SocketOwner
from interceptor.proxy.original_dst import DirectDial, refuse_loop
from interceptor.proxy.owner import Process
from interceptor.proxy.raw_icmp import tell_unreachable
from interceptor.proxy.raw_udp import reply
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.upstream import PASSTHROUGH_V4, PASSTHROUGH_V6, UpstreamError
from interceptor.sockets import (
    Address,
    address,
    forget_errors,
    original_dst_of,
    receive_errors,
    set_freebind,
    set_mark,
    set_transparent,
)

OnUdpEnd: TypeAlias = Callable[[Address, Address], None]

UDP = socket.IPPROTO_UDP
MAX_DATAGRAM = 65535
ANCILLARY_SIZE = 256
# Datagrams taken from one socket in one go.
BATCH = 32
# Each flow has two descriptors; a flood of sources must not take all that TCP needs.
MAX_FLOWS = 4096


class UdpRelay:
    """All flows of one UDP listener."""

    def __init__(self, runtime: Runtime, bound: BoundListener) -> None:
        self._runtime = runtime
        self._bound = bound
        self._flows: dict[tuple[Address, Address], UdpFlow] = {}
        runtime.loop.watch(bound.sock.fileno(), EPOLLIN, self._ready)

    def close(self) -> None:
        """End all flows."""
        for flow in list(self._flows.values()):
            flow.end("drained", None)

    def _ready(self, _events: int) -> None:
        for _ in range(BATCH):
            try:
                datagram, ancillary, _flags, sockaddr = self._bound.sock.recvmsg(MAX_DATAGRAM, ANCILLARY_SIZE)
            except OSError:
                return  # nothing left; or an ICMP error about a reply, which concerns a flow that will time out
            destination = original_dst_of(ancillary)
            if destination is None:
                self._runtime.counts.add(REFUSED, "no_original_dst")
                continue
            flow = self._flow(address(sockaddr), destination)
            if flow is not None:
                flow.from_client(datagram)

    def _flow(self, client: Address, destination: Address) -> UdpFlow | None:
        flow = self._flows.get((client, destination))
        if flow is not None:
            return flow
        counts = self._runtime.counts
        settings, listener = self._runtime.settings, self._bound.listener
        try:
            refuse_loop(destination.sockaddr, settings.own_ports | {listener.port}, self._bound.view.netlink.is_local)
        except DirectDial as error:
            counts.add(REFUSED, error.reason)
            return None
        if len(self._flows) >= MAX_FLOWS:
            counts.add(REFUSED, "too_many_udp_flows")
            return None
        try:
            flow = UdpFlow(self._runtime, self._bound, client, destination, self._forget)
        except (OSError, UpstreamError, NetnsError):
            counts.add(REFUSED, "udp_upstream_failed")
            return None
        self._flows[client, destination] = flow
        counts.add(UDP_OPENED, listener.direction)
        return flow

    def _forget(self, client: Address, destination: Address) -> None:
        del self._flows[client, destination]


class UdpFlow:
    """One client talking to one original destination."""

    def __init__(self, runtime: Runtime, bound: BoundListener, client: Address, destination: Address, on_end: OnUdpEnd) -> None:
        self._runtime = runtime
        self._bound = bound
        self._client = client
        self._destination = destination
        self._on_end = on_end
        self._sent = self._received = 0
        self._ended = False
        self._time = time.time()
        self._start = time.monotonic()
        names = runtime.names if bound.listener.direction == "outbound" else None
        self._dns_name = None if names is None else names.name_of(str(destination.ip))
        self._client_half: socket.socket | None = None
        if bound.replies is not None:
            self._upstream = _application_socket(runtime, client, destination)
        else:
            self._client_half = _reply_socket(bound, client, destination)
            try:
                self._upstream = runtime.dial_datagram(destination)
                receive_errors(self._upstream)  # else it hears of a refusal alone, not of a host that is not there
            except UpstreamError:
                self._client_half.close()
                raise
            runtime.loop.watch(self._client_half.fileno(), EPOLLIN, self._client_ready)
        self._upstream_local = self._upstream.getsockname()
        runtime.loop.watch(self._upstream.fileno(), EPOLLIN, self._upstream_ready)
        self._timer = self._watch_idleness(0)

    def from_client(self, datagram: bytes) -> None:
        """Pass one datagram of the client on. What the kernel will not take now is lost, as datagrams may be."""
        try:
            self._sent += self._upstream.sendto(datagram, self._destination.sockaddr)
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error.errno or 0)

    def end(self, reason: str, error: str | None) -> None:
        """Close both halves and report."""
        self._ended = True
        self._timer.cancel()
        if self._client_half is not None:
            self._runtime.loop.dispose(self._client_half)
        self._runtime.loop.dispose(self._upstream)
        self._on_end(self._client, self._destination)
        listener = self._bound.listener
        counts = self._runtime.counts
        counts.add(UDP_CLOSED, listener.direction)
        counts.add(SENT, listener.direction, count=self._sent)
        counts.add(RECEIVED, listener.direction, count=self._received)
        owner, process = (None, None) if listener.direction == "inbound" else self._local_end()
        self._runtime.record(
            Flow(
                self._time,
                "udp",
                listener.direction,
                listener,
                self._client.sockaddr,
                self._destination.sockaddr,
                self._upstream_local,
                self._sent,
                self._received,
                (time.monotonic() - self._start) * 1000,
                reason,
                error,
                owner.uid if owner else None,
                process.pid if process else None,
                process.command if process else None,
                dns_name=self._dns_name,
            )
        )

    def _local_end(self) -> tuple[SocketOwner | None, Process | None]:
        # A client that is gone by now has no owner any more; datagram flows end by silence, so most are still there.
        view = self._bound.view
        owner: SocketOwner | None = None
        try:
            owner = view.netlink.owner(UDP, self._client, self._destination)
            return owner, view.finder.find(owner.inode) if owner else None
        except OSError:
            return owner, None  # out of descriptors: stays unknown

    def _client_ready(self, _events: int) -> None:
        assert self._client_half is not None
        for _ in range(BATCH):
            try:
                datagram = self._client_half.recv(MAX_DATAGRAM)
            except OSError:
                return  # nothing left; or the client's port is closed, and the flow ends by silence
            self.from_client(datagram)
            if self._ended:
                return

    def _upstream_ready(self, _events: int) -> None:
        for _ in range(BATCH):
            try:
                datagram, sender = self._upstream.recvfrom(MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError as error:
                if self._failed(error.errno or 0):
                    return
                continue
            if sender[1] != self._destination.port:
                continue  # not the application we asked; its address may be any of its own, see _application_socket
            try:
                self._received += self._to_client(datagram)
            except OSError:
                continue  # the client takes no more, or its port is closed: this datagram is lost, as datagrams may be

    def _failed(self, number: int) -> bool:
        """The upstream said so: the flow ends, and the client is told; False for what concerns one datagram alone."""
        if number == errno.EMSGSIZE:
            # Larger than the path takes: the kernel knows now, and cuts the next one up.
            forget_errors(self._upstream)
            return False
        errors = self._bound.errors
        if errors is not None:
            with suppress(OSError):  # it would have been a courtesy
                tell_unreachable(errors, self._client, self._destination, number)
        self.end("upstream_failed", errno_name(number))
        return True

    def _to_client(self, datagram: bytes) -> int:
        if self._client_half is not None:
            return self._client_half.send(datagram)
        assert self._bound.replies is not None
        return reply(self._bound.replies, datagram, self._destination, self._client)

    def _watch_idleness(self, moved_before: int) -> Scheduled:
        # Counts are compared only when the time is up: a flow lives up to twice as long, and a datagram costs no timer.
        def check() -> None:
            moved = self._sent + self._received
            if moved == moved_before:
                self.end("closed", None)
            else:
                self._timer = self._watch_idleness(moved)

        return self._runtime.loop.later(self._runtime.settings.udp_idle_s, check)


def _application_socket(runtime: Runtime, client: Address, destination: Address) -> socket.SocketType:
    """A socket from 127.0.0.6 or ::6, or with `original_source` from the client's address.

    Not connected: an application that listens on all addresses answers 127.0.0.6 from 127.0.0.1.
    """
    source = runtime.inbound_source(client.sockaddr, destination.sockaddr)
    sock = runtime.open_socket(destination.family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        receive_errors(sock)
        if runtime.settings.upstream_mark is not None:
            set_mark(sock, runtime.settings.upstream_mark)
        if source not in (PASSTHROUGH_V4, PASSTHROUGH_V6):
            set_transparent(sock)
            set_freebind(sock)
        sock.bind(source)
    except OSError:
        sock.close()
        raise
    if sock.getsockname()[1] == client.port and source[0] == client.sockaddr[0]:
        # The client's own port, by chance: conntrack would take the two flows for one. The next socket gets another.
        other = _application_socket(runtime, client, destination)
        sock.close()
        return other
    return sock


def _reply_socket(bound: BoundListener, client: Address, destination: Address) -> socket.socket:
    sock = bound.view.open_socket(destination.family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        set_transparent(sock)
        # Flows of several clients to one destination are bound to the same address; their peers tell them apart.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(destination.sockaddr)
        sock.connect(client.sockaddr)
    except OSError:
        sock.close()
        raise
    return sock
