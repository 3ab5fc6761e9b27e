"""DNS clients over TCP: many questions on one connection, answered as the answers come (RFC 7766). Reads no message.

Whoever waits for nothing and says nothing is closed (RFC 7766 6.2.3). Who takes no answers is not asked for more questions,
and then says nothing as well.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from select import EPOLLERR, EPOLLHUP
from socket import SHUT_WR, SocketType
from typing import Any

from interceptor.proxy import closing
from interceptor.proxy.dns.resolver import Question, Resolver
from interceptor.proxy.listeners import Protocol
from interceptor.proxy.loop import STREAM, Scheduled
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.settings import Listener
from interceptor.sockets import SockAddr

MAX_STREAMS = 256
# Questions of one client that wait at once; further ones stay in its socket until then.
MAX_PENDING = 64
# A resolver of the C library asks its two questions and closes; unbound keeps clients for 30 s, "a few seconds" is RFC 7766's.
IDLE_S = 10.0
# Of a client that does not take its answers, no more questions are read.
MAX_UNSENT = 64 * 1024
# A hundred questions, which the cache answers in 2 ms; then it is the others' turn.
READ_SIZE = 4096
PREFIX = 2


class DnsStreams:
    """The connections of one TCP listener."""

    protocol: Protocol = "tcp"

    def __init__(self, runtime: Runtime, listener: Listener, resolver: Resolver) -> None:
        self.runtime = runtime
        self.listener = listener
        self.resolver = resolver
        self.open: set[DnsStream] = set()

    def admit(self, _listener: Listener, _client: SockAddr, _destination: SockAddr) -> str | None:
        """Why there is no room for one more; None when there is. As hooks.Admit."""
        return "too_many_dns_connections" if len(self.open) >= MAX_STREAMS else None

    def take(self, sock: SocketType, client: SockAddr, destination: SockAddr) -> None:
        """Answer on `sock`, a connection of `client` that was going to `destination`."""
        self.open.add(DnsStream(self, sock, client, destination))

    def close(self) -> None:
        """End all connections."""
        for stream in tuple(self.open):
            stream.close()

    def deliver(self, response: bytes, to: Any) -> None:
        """Answer on the stream `to`. Raises ConnectionResetError when it has ended."""
        to.answer(response)


class DnsStream:
    """One connection: a question is its length in two bytes, then that many."""

    def __init__(self, streams: DnsStreams, sock: SocketType, client: SockAddr, destination: SockAddr) -> None:
        self._streams = streams
        self._sock = sock
        self._client = client
        self._destination = destination
        self._received = bytearray()
        self._unsent = bytearray()
        self._pending = 0
        self._ended = False  # the client says no more
        self._closed = False
        self._asking = False
        self._active = False
        streams.runtime.loop.watch(sock.fileno(), STREAM, self._ready)
        self._timer: Scheduled = streams.runtime.loop.later(IDLE_S, self._look)

    def answer(self, response: bytes) -> None:
        """One answer, to whichever question. Raises ConnectionResetError when nobody wants it any more."""
        self._pending -= 1
        if self._closed:
            raise ConnectionResetError(errno.ECONNRESET, "the connection has ended")
        self._unsent += len(response).to_bytes(PREFIX) + response
        self._send()
        if not self._closed and not self._asking:
            # Questions that had to wait for room; and bytes that were not read, of which nobody tells again.
            self._streams.runtime.loop.postpone(self._go_on)

    def close(self) -> None:
        """Reset it, unless everything was said."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._streams.open.discard(self)
        loop = self._streams.runtime.loop
        if self._ended and not self._unsent and not self._pending:
            loop.dispose(self._sock)
        else:
            closing.abort(loop, self._sock)

    def _ready(self, events: int) -> None:
        if events & (EPOLLERR | EPOLLHUP):
            self.close()
            return
        if self._unsent:
            self._send()
        self._go_on()

    def _go_on(self) -> None:
        # Told once of what has come: so until there is nothing, or no room, or it is the others' turn.
        self._ask()
        if not (self._closed or self._ended) and self._has_room():
            try:
                chunk = self._sock.recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            self._active = True
            self._received += chunk
            self._ended = not chunk
            self._ask()
            if not self._ended:
                self._streams.runtime.loop.postpone(self._go_on)
        self._end_if_done()

    def _has_room(self) -> bool:
        return self._pending < MAX_PENDING and len(self._unsent) < MAX_UNSENT

    def _ask(self) -> None:
        received = self._received
        self._asking = True
        at = 0
        while not self._closed and self._has_room() and len(received) - at >= PREFIX:
            end = at + PREFIX + int.from_bytes(received[at : at + PREFIX])
            if end > len(received):
                break
            message, at = bytes(received[at + PREFIX : end]), end
            self._pending += 1
            waiting = self._pending
            question = Question(self._streams, self._client, self, message, self._destination)
            if not self._streams.resolver.ask(question) and self._pending == waiting:
                self._pending -= 1  # dropped: there will be no answer
        del received[:at]
        self._asking = False

    def _send(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
                self._active = True
        except BlockingIOError:
            pass  # the rest when there is room
        except OSError:
            self.close()

    def _end_if_done(self) -> None:
        if self._closed or not self._ended or self._pending or self._unsent:
            return
        # A question that is cut is no question: what is left of one ends with its connection.
        with suppress(OSError):  # reset meanwhile, which is an end as well
            self._sock.shutdown(SHUT_WR)
        self.close()

    def _look(self) -> None:
        if not self._active and not self._pending:
            # Said for longer than anybody needs to.
            self._ended = self._ended or not self._received
            self.close()
            return
        self._active = False
        self._timer = self._streams.runtime.loop.later(IDLE_S, self._look)
