"""The sockets from which resolvers are asked over UDP. Reads no more of a message than its id, and decides nothing.

What makes an answer from elsewhere hard to forge is a port and an id that nobody can guess (RFC 5452 9.2). A port for each
question costs eight system calls and a conntrack entry that stays for half a minute. So under load, and only then, the next few
questions go from the same port, each with an id of its own: a guess is as unlikely as ever, 1 in 65,536 times the number of
ports, as those who wait there wait for different answers (resolver.py); and whoever finds out a port has a second at most to
use it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from select import EPOLLIN
from typing import Protocol

from interceptor.proxy.flows import errno_name
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.upstream import UpstreamError
from interceptor.sockets import Address, SockAddr

MAX_MESSAGE = 65535
# How many questions go from one port, and for how long new ones do: most of the saving, and a tenth of the time that it
# takes to find a port by the side channels known (SAD DNS, 2020: about 1,000 guesses a second).
USES = 16
LIFE_S = 1.0
# Wrong ids, other questions: somebody guesses, or the resolver is confused. The port is given up before he is right. More than
# USES: answers that come too late are no guesses.
MAX_WRONG = 32
# Answers taken in one go, so that a flood does not keep the others waiting.
BATCH = 32


class Asking(Protocol):
    """Whoever waits for an answer on a port."""

    def take(self, message: bytes) -> bool:
        """Whether `message`, of the right id, is the answer that was waited for."""

    def lose(self, error: str) -> None:
        """There will be no answer on this port."""


def random_ids() -> Iterator[bytes]:
    """Message ids that nobody can guess."""
    while True:
        pool = os.urandom(512)
        for at in range(0, len(pool), 2):
            yield pool[at : at + 2]


class Ports:
    """Of one worker. `near_ends` is told the address of each port that is open."""

    def __init__(self, runtime: Runtime, near_ends: set[SockAddr]) -> None:
        self._runtime = runtime
        self._near_ends = near_ends
        self._ids = random_ids()
        self._current: dict[Address, Port] = {}

    def ask(self, upstream: Address, question: bytes, asking: Asking) -> tuple[Port, bytes]:
        """Send `question` under an id of its own; the port and the id that `asking` waits for. Raises UpstreamError."""
        port = self._current.get(upstream)
        if port is None:
            port = self._current[upstream] = Port(self, self._runtime, upstream)
            self._near_ends.add(port.local)
        message_id = next(self._ids)
        while message_id in port.waiting:
            message_id = next(self._ids)
        port.send(message_id, question, asking)
        return port, message_id

    def close(self) -> None:
        """Use none of them any more."""
        for port in tuple(self._current.values()):
            port.retire()

    def retired(self, port: Port) -> None:
        """`port` is for no more questions."""
        if self._current.get(port.upstream) is port:
            del self._current[port.upstream]

    def closed(self, port: Port) -> None:
        """`port` is no more."""
        self._near_ends.discard(port.local)


class Port:
    """A socket connected to `upstream`. `waiting`: by the id."""

    __slots__ = (
        "_closed",
        "_ports",
        "_retired",
        "_runtime",
        "_sock",
        "_timer",
        "_uses",
        "_wrong",
        "local",
        "upstream",
        "waiting",
    )

    def __init__(self, ports: Ports, runtime: Runtime, upstream: Address) -> None:
        self.upstream = upstream
        self.waiting: dict[bytes, Asking] = {}
        self._ports = ports
        self._runtime = runtime
        self._uses = self._wrong = 0
        self._retired = self._closed = False
        self._sock = runtime.dial_datagram(upstream)
        self.local: SockAddr = self._sock.getsockname()
        runtime.loop.watch(self._sock.fileno(), EPOLLIN, self._ready)
        self._timer = runtime.loop.later(LIFE_S, self.retire)

    def send(self, message_id: bytes, question: bytes, asking: Asking) -> None:
        """Ask `question` under `message_id`. Raises UpstreamError, also when an earlier one could not be delivered."""
        self._uses += 1
        try:
            self._sock.send(message_id + question[2:])
        except OSError as error:
            self._fail(errno_name(error.errno or 0))
            raise UpstreamError("send", error.errno or errno.EIO) from error
        self.waiting[message_id] = asking
        if self._uses >= USES:
            self.retire()

    def forget(self, message_id: bytes) -> None:
        """Nobody waits for an answer to `message_id` any more."""
        self.waiting.pop(message_id, None)
        self._close_if_done()

    def retire(self) -> None:
        """Take no more questions, and close when those that wait have their answers."""
        if not self._retired:
            self._retired = True
            self._timer.cancel()
            self._ports.retired(self)
        self._close_if_done()

    def _ready(self, _events: int) -> None:
        for _ in range(BATCH):
            try:
                message = self._sock.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(errno_name(error.errno or 0))
                return
            asking = self.waiting.get(message[:2])
            if asking is None or not asking.take(message):
                self._wrong += 1
                if self._wrong >= MAX_WRONG:
                    self._fail("answers that fit no question")
            if self._closed or not self.waiting:
                return

    def _fail(self, error: str) -> None:
        waiting, self.waiting = self.waiting, {}
        self.retire()
        for asking in waiting.values():
            asking.lose(error)

    def _close_if_done(self) -> None:
        if self._retired and not self.waiting and not self._closed:
            self._closed = True
            self._ports.closed(self)
            self._runtime.loop.dispose(self._sock)
