"""What every relay promises. One test suite, tests/proxy/test_relay.py, holds them all to it.

A relay moves bytes and reports edges; it never shuts down or closes a socket, and never decides what an edge means.
"""

from __future__ import annotations

from socket import SocketType
from typing import Protocol

from interceptor.proxy.session import Event


class Edges(Protocol):
    """Who is told of the edges: the connection."""

    def feed(self, event: Event, number: int = 0) -> None:
        """One of CLIENT_EOF, UPSTREAM_EOF, CLIENT_FAILED, UPSTREAM_FAILED; `number` is a failure's errno.

        Called from the event loop or from within `Running.start`. It may call `Running.stop`.
        """


class Running(Protocol):
    """A relay at work between two sockets."""

    @property
    def name(self) -> str:
        """The relay's name in the flow record."""

    @property
    def asks_peers(self) -> bool:
        """Whether what the two sockets say (FIN, keepalive) reaches the peers; otherwise those talk to each other."""

    @property
    def ended_at(self) -> float | None:
        """When the flow had ended (time.monotonic()), if that is known better than by the last edge."""

    @property
    def sent(self) -> int:
        """Bytes taken from the client and accepted by the upstream's socket."""

    @property
    def received(self) -> int:
        """Bytes taken from the upstream and accepted by the client's socket."""

    def start(self, first: bytes) -> None:
        """Begin: `first` goes to the upstream before anything of the client's."""

    def stop(self) -> None:
        """Touch the sockets no more. Idempotent."""


class Relay(Protocol):
    """A way to move bytes.

    It holds at most a bounded amount of bytes a direction: when one side does not read, the other is not read from.
    An EOF comes once a side, after everything that side sent has been written to the other. A failure comes at most once,
    as the last edge, after everything the broken side had sent before has been offered to the other.
    """

    def prepare(self, client: SocketType, upstream: SocketType) -> bytes:
        """What the client has said so far, if it was read; `start` is to be given it. `upstream` is not connected yet."""

    def join(self, client: SocketType, upstream: SocketType, edges: Edges) -> Running:
        """What will move bytes both ways between two connected, non-blocking sockets, once started.

        If the loop watches one of them already, then `upstream` as a STREAM and `client` for ARRIVALS; from `start` on their
        events are the relay's.
        """

    def abandon(self, client: SocketType) -> None:
        """There will be no `join` for `client`, prepared or not: its upstream failed, or we answer it ourselves."""

    def close(self) -> None:
        """Give back what is kept between flows."""
