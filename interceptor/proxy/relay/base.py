"""What every relay promises. One test suite, tests/proxy/test_relay.py, holds them all to it.

A relay moves bytes and reports edges; it never shuts down or closes a socket, and never decides what an edge means.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol, TypeAlias

from interceptor.proxy.session import Eof, RelayFailed

# Called with each edge, from the event loop, never from within `start`. The callee may call `stop`.
OnEdge: TypeAlias = Callable[[Eof | RelayFailed], None]


class Running(Protocol):
    """A relay at work between two sockets."""

    @property
    def sent(self) -> int:
        """Bytes taken from the client and accepted by the upstream's socket."""

    @property
    def received(self) -> int:
        """Bytes taken from the upstream and accepted by the client's socket."""

    def stop(self) -> None:
        """Touch the sockets no more. Idempotent."""


class Relay(Protocol):
    """A way to move bytes.

    It holds at most a bounded amount of bytes a direction: when one side does not read, the other is not read from.
    Eof(side) comes once, after everything that side sent has been written to the other. RelayFailed comes at most once, as
    the last edge, after everything the broken side had sent before has been offered to the other.
    """

    @property
    def name(self) -> str:
        """The name in the flow record."""

    def start(self, client: socket.socket, upstream: socket.socket, on_edge: OnEdge) -> Running:
        """Move bytes both ways between two connected, non-blocking sockets that the loop does not watch."""
