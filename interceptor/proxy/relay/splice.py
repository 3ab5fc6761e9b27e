"""The splice relay: small payloads through one shared buffer, bulk through a pipe without ever becoming Python objects.

Edge-triggered: each end is told once that bytes came, and reads until there are none. Knows sockets and edges, not flows.
"""

from __future__ import annotations

import errno
from os import SPLICE_F_MOVE, SPLICE_F_NONBLOCK, splice
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from socket import IPPROTO_TCP, MSG_MORE, TCP_QUICKACK, SocketType

from interceptor.proxy.loop import Loop
from interceptor.proxy.relay.base import Edges
from interceptor.proxy.relay.pipes import PIPE_SIZE, Pipe, PipePool
from interceptor.proxy.session import Event
from interceptor.sockets import pending_error

# A read that fills it is taken for the start of bulk. Also what a direction holds in user memory while its receiver is slow.
BUFFER_SIZE = 64 * 1024
# What is read of the client before its upstream is open: most requests, and little to keep if the upstream is slow.
FIRST_SIZE = 4 * 1024
# Reads in a row before the other connections have their turn: 8 MiB of a sender that never pauses.
BUDGET = 8
# A direction gives its pipe back when it was found empty so often without having moved much between.
QUIET_ROUNDS = 16
MUCH = 32 * 1024

FLAGS = SPLICE_F_NONBLOCK | SPLICE_F_MOVE
TROUBLE = EPOLLERR | EPOLLHUP
# After these, a short read does not mean that the queue is empty: an end or a mark is behind the bytes, and told once.
MORE = TROUBLE | EPOLLRDHUP | EPOLLPRI
READABLE = EPOLLIN | MORE


class _Nobody:
    """Who is told once a relay is stopped."""

    def feed(self, event: Event, number: int = 0) -> None:
        """It is over: nothing to be done."""


NOBODY = _Nobody()


class SpliceRelay:
    """Joins ends on one loop. They share one buffer, since the loop serves one at a time, and the pipes."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.buffer = bytearray(BUFFER_SIZE)
        self.view = memoryview(self.buffer)
        self.pipes = PipePool()
        # What the upstream's end of a stopped relay has for a peer, so that the two do not keep each other in memory.
        self.nothing = UpstreamEnd(self, _closed_socket(), NOBODY)
        self.nothing.peer = self.nothing
        self.nothing.let_go()

    def prepare(self, client: SocketType, upstream: SocketType) -> bytes:
        """See Relay.prepare."""
        try:
            first = client.recv(FIRST_SIZE)
        except OSError:
            return b""  # nothing there yet; or it is broken, and says so again when it is read
        if first:
            # The handshake's last ACK waits for these bytes, at most as long as any delayed ACK (tcp(7)): one packet, not two.
            upstream.setsockopt(IPPROTO_TCP, TCP_QUICKACK, 0)
        return first

    def join(self, client: SocketType, upstream: SocketType, edges: Edges) -> ClientEnd:
        """See Relay.join."""
        near, far = ClientEnd(self, client, edges), UpstreamEnd(self, upstream, edges)
        near.peer = far
        far.peer = near
        return near

    def abandon(self, client: SocketType) -> None:
        """See Relay.abandon. Nothing was begun."""

    def close(self) -> None:
        """Give the pipes back."""
        self.pipes.close()


def _closed_socket() -> SocketType:
    sock = SocketType()
    sock.close()
    return sock


class End:
    """One socket, and the direction that starts from it: what it sent and its peer has not taken yet."""

    __slots__ = (
        "edges",
        "ended",
        "errno",
        "held",
        "more",
        "peer",
        "pipe",
        "postponed",
        "quiet",
        "shared",
        "sock",
        "tells_room",
        "unsent",
        "written",
    )

    EOF: Event
    FAILED: Event
    TELLS_ROOM: bool  # whether it is watched for room from the start
    peer: End
    quiet: int  # see QUIET_ROUNDS; since there is a pipe

    def __init__(self, shared: SpliceRelay, sock: SocketType, edges: Edges) -> None:
        self.shared = shared
        self.sock = sock
        self.edges = edges
        self.pipe: Pipe | None = None
        self.unsent: bytes | None = None  # read, but not taken by the peer
        self.held = False  # not to be read now: the peer has to take the last read first, or is broken; or this end ended
        self.ended = False  # its FIN was read
        self.errno = 0  # SO_ERROR is given once: send() may eat what recv() would have said
        self.more = 0  # of MORE, what was told: read until there is nothing
        self.postponed = False  # the loop will call read_on
        self.tells_room = self.TELLS_ROOM
        self.written = 0  # bytes written to this end

    def ready(self, events: int) -> None:
        """The loop's call: something changed at this end."""
        if events & EPOLLOUT and self.peer.held:
            self.peer.resume()
        if events & MORE:
            self.more |= events & MORE
            if self.held:
                if events & EPOLLERR:
                    self._note_error()
                return
        elif self.held or not events & EPOLLIN:
            return
        self.read()

    def read(self) -> None:
        """Take what came, give it to the peer. Two calls a payload: this is where requests per second are made."""
        if self.pipe is not None:
            self._move(self.pipe)
            return
        shared, peer = self.shared, self.peer
        while True:
            try:
                size = self.sock.recv_into(shared.buffer)
            except BlockingIOError:
                self.more = 0
                return
            except OSError as error:
                self._fail(error.errno or errno.EIO)
                return
            if not size:
                self._end()
                return
            chunk = shared.view[:size]
            try:
                # With an end behind the bytes, the kernel may hold them for a moment: they and the FIN are then one packet.
                sent = peer.sock.send(chunk, MSG_MORE if self.more & EPOLLRDHUP else 0)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                peer.break_off(error.errno or errno.EIO)
                return
            peer.written += sent
            if sent < size:
                self._keep(bytes(chunk[sent:]))
                return
            if size == BUFFER_SIZE:
                self._read_bulk()
                return
            if not self.more:
                return
            if self.more == EPOLLRDHUP:
                # The FIN was there before these bytes were read, and no error and no mark: behind a short read is only the end.
                self._end()
                return

    def read_on(self) -> None:
        """The loop's call: it is this end's turn again."""
        self.postponed = False
        if not self.held:
            self.read()

    def resume(self) -> None:
        """The peer may take bytes again: what waits, and then what came meanwhile."""
        unsent, pipe = self.unsent, self.pipe
        if unsent is not None:
            self.unsent = None
            self.held = False
            if self.write_to_peer(unsent):
                self.read()
        elif pipe is not None and pipe.filled:
            self.held = False
            if self._empty(pipe):
                self.read()

    def write_to_peer(self, chunk: bytes) -> bool:
        """Whether the peer took all of it. The rest is kept, and this end held."""
        peer = self.peer
        try:
            size = peer.sock.send(chunk)
        except BlockingIOError:
            size = 0
        except OSError as error:
            peer.break_off(error.errno or errno.EIO)
            return False
        peer.written += size
        if size == len(chunk):
            return True
        self._keep(chunk[size:])
        return False

    def _keep(self, rest: bytes) -> None:
        self.unsent = rest
        self.held = True
        self.peer.await_room()

    def await_room(self) -> None:
        """Have the loop tell when this end takes bytes again; that it does by now is told as well."""
        if not self.tells_room:
            self.tells_room = True
            self.shared.loop.watch_room(self.sock.fileno(), self.ready)

    def _read_bulk(self) -> None:
        pipe = self.shared.pipes.take()
        if pipe is None:
            self._postpone()  # through the buffer then, one read a turn
            return
        self.pipe = pipe
        self.quiet = 0
        self._move(pipe)

    def _move(self, pipe: Pipe) -> None:
        """Socket, pipe, socket, until there is nothing, the peer takes no more, or it is the others' turn."""
        descriptor = self.sock.fileno()
        for _ in range(BUDGET):
            try:
                size = splice(descriptor, pipe.writing, PIPE_SIZE, flags=FLAGS)
            except BlockingIOError:
                self._pause(pipe)
                return
            except OSError as error:
                self._fail(error.errno or errno.EIO)
                return
            if not size:
                self._end()
                return
            if size > MUCH:
                self.quiet = 0
            pipe.filled = size
            if not self._empty(pipe):
                return
        self._postpone()

    def _empty(self, pipe: Pipe) -> bool:
        """Whether the peer took all that was in `pipe`. If not, this end is held."""
        peer = self.peer
        descriptor = peer.sock.fileno()
        try:
            while pipe.filled:
                size = splice(pipe.reading, descriptor, pipe.filled, flags=FLAGS)
                pipe.filled -= size
                peer.written += size
        except BlockingIOError:
            self.held = True
            peer.await_room()
            return False
        except OSError as error:
            peer.break_off(error.errno or errno.EIO)
            return False
        return True

    def _pause(self, pipe: Pipe) -> None:
        self.quiet += 1
        if self.quiet > QUIET_ROUNDS:
            self.pipe = None
            self.shared.pipes.give_back(pipe)

    def _postpone(self) -> None:
        # Once: an event that comes meanwhile reads as well, and would start a second series of turns.
        if not self.postponed:
            self.postponed = True
            self.shared.loop.postpone(self.read_on)

    def _end(self) -> None:
        if self.errno:
            self._fail(self.errno)
            return
        self.ended = self.held = True
        if self.pipe is not None:
            self.let_go()
        self.edges.feed(self.EOF)

    def break_off(self, number: int) -> None:
        """This end takes no more bytes. It may have sent some before, and the peer would have got them without us.

        A server that answers early and closes resets the connection under a client that still sends; its answer is in our
        receive queue. So read on, and fail when that is read.
        """
        self.errno = self.errno or number
        self.peer.let_go()
        if self.ended or self.peer.errno:
            self._fail(self.errno)
        elif not self.held:
            self.more |= EPOLLERR
            self.read()

    def _note_error(self) -> None:
        # It cannot be read now, so nobody else asks.
        number = pending_error(self.sock)
        if number:
            self.break_off(number)

    def _fail(self, number: int) -> None:
        self.let_go()
        self.peer.let_go()
        self.edges.feed(self.FAILED, number)

    def let_go(self) -> None:
        """Read no more, and forget what was read."""
        self.held = True
        self.unsent = None
        pipe = self.pipe
        if pipe is not None:
            self.pipe = None
            self.shared.pipes.give_back(pipe)


class UpstreamEnd(End):
    """The upstream's, watched for room since it was dialled."""

    __slots__ = ()
    EOF = Event.UPSTREAM_EOF
    FAILED = Event.UPSTREAM_FAILED
    TELLS_ROOM = True


class ClientEnd(End):
    """The client's; stands for both towards the connection (Running). Watched for room once it lacked some; most never do."""

    __slots__ = ()
    name = "splice"
    asks_peers = True
    ended_at = None
    EOF = Event.CLIENT_EOF
    FAILED = Event.CLIENT_FAILED
    TELLS_ROOM = False

    @property
    def sent(self) -> int:
        """See Running.sent."""
        return self.peer.written

    @property
    def received(self) -> int:
        """See Running.received."""
        return self.written

    def start(self, first: bytes) -> None:
        """See Running.start."""
        loop = self.shared.loop
        client, upstream = self.sock.fileno(), self.peer.sock.fileno()
        # What of the client was told before, nobody will tell again.
        was_told = loop.is_watched(client)
        self.more = EPOLLIN if was_told else 0
        loop.watch_stream(upstream, self.peer.ready)
        # The client's bytes usually wait already: read before it is watched, they need no event. Behind some that were read
        # there are seldom more at once, and a read in vain costs an exception: the loop will tell.
        if not first or (self.write_to_peer(first) and was_told):
            self.read()
        if self.edges is not NOBODY:
            loop.watch_arrivals(client, self.ready)

    def stop(self) -> None:
        """See Running.stop."""
        far = self.peer
        self.let_go()
        far.let_go()
        self.edges = far.edges = NOBODY
        far.peer = self.shared.nothing
