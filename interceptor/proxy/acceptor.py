"""Take connections off one TCP listener, refuse what would loop, and begin the rest. Ends none."""

from __future__ import annotations

import errno
import time
from socket import SocketType
from typing import TYPE_CHECKING

from interceptor.proxy import closing
from interceptor.proxy.connection import Connection
from interceptor.proxy.flows import Flow, errno_name
from interceptor.proxy.hooks import Admit
from interceptor.proxy.listeners import BoundListener
from interceptor.proxy.loop import LISTENER
from interceptor.proxy.metrics import ACCEPT_ERRORS, ADOPTED, REFUSED, ListenerCounts
from interceptor.proxy.original_dst import NoOriginalDst, original_dst_of, refuse_loop
from interceptor.proxy.probe import ProbeAnswer
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.sweep import Sweep
from interceptor.sockets import SockAddr, accept, normal, waiting

if TYPE_CHECKING:  # brings dnspython
    from interceptor.proxy.dns.streams import DnsStreams

# accept() says these when the host, not the client, has a problem (trio's ACCEPT_CAPACITY_ERRNOS): asking again at once
# would spin, and nobody tells when there is room again.
ACCEPT_CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
ACCEPT_PAUSE_S = 0.1  # trio's
# Connections taken in one go, so that a flood of new ones does not starve those that run.
ACCEPT_BATCH = 64


class Acceptor:
    """One listener's. `dns`: what answers its connections, when it is the one for DNS."""

    def __init__(
        self,
        runtime: Runtime,
        bound: BoundListener,
        own_ports: frozenset[int],
        sweep: Sweep,
        dns: DnsStreams | None,
    ) -> None:
        self.runtime = runtime
        self.listener = bound.listener
        self.direction = bound.listener.direction
        self._sock = bound.sock
        self._family = int(bound.sock.family)
        self._is_local = bound.view.netlink.is_local
        self._own_ports = own_ports
        self._sweep = sweep
        self._dns = dns
        self._original_dst = original_dst_of(bound.listener, bound.originals)
        self._admit = self._admits()
        self._open = True
        self.counts = ListenerCounts(runtime.counts, bound.listener.direction, bound.listener.mode)
        runtime.loop.watch(self._sock.fileno(), LISTENER, self._ready)

    def close(self) -> None:
        """Take those that wait already, whose clients think they are connected, and no more."""
        while self._take_batch():
            pass
        self._open = False
        # Explicitly: `interceptor run` has a second descriptor for the same socket.
        self.runtime.loop.unwatch(self._sock.fileno())
        self.runtime.loop.dispose(self._sock)

    def resume(self, connection: Connection) -> None:
        """`connection` was accepted by a process that is gone."""
        self.runtime.counts.add(ADOPTED)
        self.counts.opened()
        self._sweep.add(connection)

    def ended(self, connection: Connection) -> None:
        """`connection` is over."""
        runtime = self.runtime
        self._sweep.remove(connection)
        if runtime.hooks.ended is not None:
            runtime.hooks.ended(connection)

    def _ready(self, _events: int) -> None:
        self._accept()

    def _accept(self) -> None:
        # Told once that somebody waits: so all that do, as far as it is not the others' turn. Who comes later is told.
        if self._open and self._take_batch():
            self.runtime.loop.postpone(self._accept)

    def _take_batch(self) -> bool:
        """Whether more may wait."""
        count, now = waiting(self._sock), time.monotonic()
        accepted, none_left = self._accept_all(ACCEPT_BATCH if count is None else min(count, ACCEPT_BATCH))
        # All before the first is dialled: of most, the first bytes are there by then.
        for client, sockaddr in accepted:
            self._take(client, normal(sockaddr), now)
        return not none_left and (count is None or count > ACCEPT_BATCH)

    def _accept_all(self, count: int) -> tuple[list[tuple[SocketType, SockAddr]], bool]:
        """Up to `count` of those who wait; and whether it is known that there are no more, or that they must wait."""
        sock, family = self._sock, self._family
        accepted: list[tuple[SocketType, SockAddr]] = []
        for _ in range(count):
            try:
                accepted.append(accept(sock, family))
            except BlockingIOError:
                return accepted, True
            except OSError as error:
                self.runtime.counts.add(ACCEPT_ERRORS, errno_name(error.errno or 0))
                if error.errno in ACCEPT_CAPACITY_ERRNOS:
                    self.runtime.loop.later(ACCEPT_PAUSE_S, self._accept)
                    return accepted, True
                # Else the client's problem, ECONNABORTED and the like (accept(2)): the next one may be well.
        return accepted, False

    def _take(self, sock: SocketType, client: SockAddr, now: float) -> None:
        runtime = self.runtime
        destination: SockAddr | None = None
        try:
            destination = self._original_dst(sock)
            if destination[1] in self._own_ports:
                refuse_loop(destination, self._own_ports, self._is_local)
        except NoOriginalDst as error:
            self._refuse(sock, client, destination, error.reason, str(error))
            return
        except OSError as error:
            self._refuse(sock, client, destination, NoOriginalDst.reason, errno_name(error.errno or 0))
            return
        if destination[1] == runtime.settings.probe_port:
            runtime.relay.abandon(sock)
            ProbeAnswer(runtime.loop, sock, self.listener, client, destination)
            return
        admit = self._admit or runtime.hooks.admit
        reason = None if admit is None else admit(self.listener, client, destination)
        if reason is not None:
            self._refuse(sock, client, destination, reason, None)
            return
        if self._dns is not None:
            self._dns.take(sock, client, destination)
            return
        connection = Connection(self, sock, client, destination, now)
        self.counts.opened()
        self._sweep.add(connection)
        connection.begin()

    def _admits(self) -> Admit | None:
        # DNS has a limit of its own: neither must the one flood keep the other out.
        if self.direction != "dns":
            return None
        return self._dns.admit if self._dns is not None else lambda _listener, _client, _destination: "no_resolver"

    def _refuse(self, sock: SocketType, client: SockAddr, to: SockAddr | None, reason: str, error: str | None) -> None:
        self.runtime.counts.add(REFUSED, reason)
        self.runtime.relay.abandon(sock)
        closing.abort(self.runtime.loop, sock)
        listener = self.listener
        self.runtime.record(
            Flow(time.time(), "tcp", listener.direction, listener, client, to, None, 0, 0, 0.0, f"refused_{reason}", error)
        )
