"""The copy relay: recv and send through one buffer. Knows sockets and edges, not why a flow is there.

Level-triggered and plain: slow, works with any stream socket, and is what the faster ones are checked against.
"""

from __future__ import annotations

import errno
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from socket import SocketType

from interceptor.proxy.loop import Loop
from interceptor.proxy.relay.base import Edges
from interceptor.proxy.session import Event
from interceptor.sockets import pending_error

# What one read takes, and so what a direction holds while its receiver is slow. 256 KiB is where a copy's cost per
# byte stops falling; ztunnel's largest buffer is the same.
CHUNK_SIZE = 256 * 1024
TROUBLE = EPOLLERR | EPOLLHUP


class CopyRelay:
    """Starts copies on one loop.

    All share one buffer, since the loop serves one at a time; a slow receiver keeps its own rest.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._chunk = memoryview(bytearray(CHUNK_SIZE))

    def prepare(self, client: SocketType, upstream: SocketType) -> bytes:  # noqa: ARG002 - the relays' common signature
        """See Relay.prepare. Nothing: it is all read later."""
        return b""

    def join(self, client: SocketType, upstream: SocketType, edges: Edges) -> Copying:
        """See Relay.join."""
        return Copying(self._loop, self._chunk, client, upstream, edges)

    def abandon(self, client: SocketType) -> None:
        """See Relay.abandon. Nothing was begun."""

    def close(self) -> None:
        """Nothing is kept between flows."""


class _End:
    """One socket, with what is known about it; `unsent` and `written` belong to the direction towards it."""

    __slots__ = ("ended", "eof", "errno", "failed", "mask", "sock", "unsent", "written")

    def __init__(self, sock: SocketType, eof: Event, failed: Event) -> None:
        self.sock = sock
        self.eof = eof
        self.failed = failed
        self.mask: int | None = None  # what the loop watches; None: not watched
        self.ended = False  # its FIN was read
        self.errno = 0  # SO_ERROR is given once: send() may eat what recv() would have said
        self.unsent = memoryview(b"")
        self.written = 0


class Copying:
    """One running copy."""

    __slots__ = ("_chunk", "_client", "_edges", "_loop", "_stopped", "_upstream")
    name = "copy"
    asks_peers = True
    ended_at = None

    def __init__(self, loop: Loop, chunk: memoryview, client: SocketType, upstream: SocketType, edges: Edges) -> None:
        self._loop = loop
        self._chunk = chunk
        self._edges = edges
        self._stopped = False
        self._client = _End(client, Event.CLIENT_EOF, Event.CLIENT_FAILED)
        self._upstream = _End(upstream, Event.UPSTREAM_EOF, Event.UPSTREAM_FAILED)

    def start(self, first: bytes) -> None:
        """See Running.start."""
        for end in (self._client, self._upstream):
            self._loop.unwatch(end.sock.fileno())  # it was told of changes only; from now on, of states
        self._upstream.unsent = memoryview(first)
        self._watch(self._client, self._upstream)
        self._watch(self._upstream, self._client)

    @property
    def sent(self) -> int:
        """See Running.sent."""
        return self._upstream.written

    @property
    def received(self) -> int:
        """See Running.received."""
        return self._client.written

    def stop(self) -> None:
        """See Running.stop."""
        self._stopped = True
        for end in (self._client, self._upstream):
            if end.mask is not None:
                self._loop.unwatch(end.sock.fileno())
                end.mask = None

    def _ready(self, end: _End, other: _End, events: int) -> None:
        if events & EPOLLOUT and end.unsent:
            self._flush(end, other)
        if events & (EPOLLIN | TROUBLE) and not self._stopped:
            if self._is_readable(end, other):
                self._read(end, other)
            elif events & TROUBLE:
                self._note_trouble(end, other)
        if not self._stopped:
            self._watch(end, other)
            self._watch(other, end)

    def _is_readable(self, end: _End, other: _End) -> bool:
        # Not while the other still has to take the last read: that is the back-pressure. Never for a broken receiver.
        return not end.ended and not other.unsent and not other.errno

    def _read(self, end: _End, other: _End) -> None:
        try:
            size = end.sock.recv_into(self._chunk)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(end, error.errno or errno.EIO)
            return
        if size:
            self._write(other, end, self._chunk[:size])
        elif end.errno:
            self._fail(end, end.errno)
        else:
            end.ended = True
            self._edges.feed(end.eof)

    def _flush(self, end: _End, other: _End) -> None:
        rest, end.unsent = end.unsent, memoryview(b"")
        self._write(end, other, rest)

    def _write(self, end: _End, other: _End, chunk: memoryview) -> None:
        try:
            size = end.sock.send(chunk)
        except BlockingIOError:
            size = 0
        except OSError as error:
            self._break(end, other, error.errno or errno.EIO)
            return
        end.written += size
        if size < len(chunk):
            end.unsent = memoryview(bytes(chunk[size:]))

    def _break(self, end: _End, other: _End, number: int) -> None:
        # A server that answers early and closes resets the connection under a client that still sends; its answer is in our
        # receive queue and the client would have got it without us. So read on, and fail when that is read.
        end.errno = end.errno or number
        end.unsent = memoryview(b"")
        if end.ended or other.errno:
            self._fail(end, end.errno)

    def _note_trouble(self, end: _End, other: _End) -> None:
        number = pending_error(end.sock)
        if number:
            self._break(end, other, number)
        if not self._stopped and not self._interest(end, other) and end.mask is not None:
            # A hang-up is reported for as long as one listens, and there is nothing to do about it now.
            self._loop.unwatch(end.sock.fileno())
            end.mask = None

    def _fail(self, end: _End, number: int) -> None:
        self.stop()
        self._edges.feed(end.failed, number)

    def _interest(self, end: _End, other: _End) -> int:
        return (EPOLLIN if self._is_readable(end, other) else 0) | (EPOLLOUT if end.unsent else 0)

    def _watch(self, end: _End, other: _End) -> None:
        mask = self._interest(end, other)
        if mask == end.mask:
            return
        if end.mask is not None:
            self._loop.change(end.sock.fileno(), mask)
        elif mask:
            self._loop.watch(end.sock.fileno(), mask, lambda events: self._ready(end, other, events))
        else:
            return
        end.mask = mask
