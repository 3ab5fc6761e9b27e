"""Look at what a client sends first, without taking it, for the names in it: server name, ALPN, HTTP host. For the log alone.

It never waits where nothing is held up: once the server speaks, the relay starts. Bytes that a client has sent part of wait for
the rest HOLD_S at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from socket import MSG_PEEK, SocketType
from typing import TypeAlias

from interceptor.proxy.client_hello import HELLO_SIZE, NotTls, client_hello
from interceptor.proxy.http_head import NotHttp, host
from interceptor.proxy.loop import Scheduled
from interceptor.proxy.settings import Kind

Later: TypeAlias = Callable[[float, Callable[[], None]], Scheduled]  # Loop.later

# The largest ClientHello that is read, in records; a Host header that comes later than this is not looked for.
PEEK_SIZE = HELLO_SIZE + 64
# What a sender's second segment may take to arrive after the first, within a continent. Nobody notices so much at a
# connection's start, and an honest client's hello is complete long before.
HOLD_S = 0.1
# Each look reads from the start. A client that sends byte by byte gets no name.
MAX_LOOKS = 8


@dataclass(frozen=True, slots=True)
class Names:
    """What was seen. None: not there, or not asked for."""

    sni: str | None = None
    alpn: str | None = None
    host: str | None = None


NOTHING = Names()


def names_in(stream: bytes, kinds: frozenset[Kind]) -> Names | None:
    """The names that a connection beginning with `stream` tells; None while there may be some in what follows."""
    undecided = False
    if "sni" in kinds:
        try:
            hello = client_hello(stream)
        except NotTls:
            pass
        else:
            if hello is not None:
                return Names(sni=hello.sni, alpn=",".join(hello.alpn) or None)
            undecided = True
    if "host" in kinds:
        try:
            found = host(stream)
        except NotHttp:
            pass
        else:
            if found is not None:
                return Names(host=found or None)
            undecided = True
    return None if undecided and len(stream) < PEEK_SIZE else NOTHING


def look(client: SocketType, kinds: frozenset[Kind], taken: bytes = b"") -> tuple[Names | None, bool]:
    """What the bytes `taken` and those waiting in `client` tell, and whether there are any; names of None: more has to come.

    A broken or ended connection tells nothing more: the relay will find out.
    """
    if taken:
        names = names_in(taken, kinds)
        if names is not None:
            return names, True
    try:
        stream = client.recv(PEEK_SIZE, MSG_PEEK)
    except BlockingIOError:
        return None, bool(taken)
    except OSError:
        return NOTHING, False
    return (names_in(taken + stream, kinds), True) if stream else (NOTHING, False)


class Peek:
    """A look at one connection. Knows no loop: whoever has one calls `client_ready` and `upstream_ready` on every change.

    `taken` are the client's first bytes, where somebody has taken them already.
    """

    __slots__ = ("_client", "_hold", "_kinds", "_later", "_looks", "_on_names", "_taken")

    def __init__(self, client: SocketType, kinds: frozenset[Kind], later: Later, taken: bytes = b"") -> None:
        self._client = client
        self._kinds = kinds
        self._later = later
        self._taken = taken
        self._looks = 0
        self._hold: Scheduled | None = None
        self._on_names: Callable[[Names], None] | None = None

    def start(self, on_names: Callable[[Names], None]) -> Names | None:
        """The names, when it is clear at once what they are; else None, and `on_names` is called later, once."""
        names, has_begun = look(self._client, self._kinds, self._taken)
        if names is None:
            self._on_names = on_names
            if has_begun:
                self._hold_on()
        return names

    def stop(self) -> None:
        """Look no more, and call nobody. Idempotent."""
        self._on_names = None
        if self._hold is not None:
            self._hold.cancel()

    def client_ready(self) -> None:
        """The client has sent something, ended or broken."""
        if self._on_names is None:
            return
        names, has_begun = look(self._client, self._kinds, self._taken)
        self._looks += has_begun
        if names is None and self._looks >= MAX_LOOKS:
            names = NOTHING
        if names is not None:
            self._end(names)
        elif has_begun and self._hold is None:
            self._hold_on()

    def upstream_ready(self) -> None:
        """The server has spoken first, ended or broken: the relay's turn. The client may have said something meanwhile."""
        self._end(look(self._client, self._kinds, self._taken)[0] or NOTHING)

    def _hold_on(self) -> None:
        self._hold = self._later(HOLD_S, lambda: self._end(NOTHING))

    def _end(self, names: Names) -> None:
        on_names = self._on_names
        self.stop()
        if on_names is not None:
            on_names(names)
