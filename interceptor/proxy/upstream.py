"""Open the upstream half: from which address, with which mark. Opens sockets only through the seam it is given."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from socket import AF_INET, AF_INET6, IPPROTO_TCP, MSG_PEEK, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, TCP_NODELAY, SocketType
from typing import TypeAlias

from interceptor.sockets import Address, SockAddr, set_freebind, set_late_port, set_mark, set_transparent

# The seam: `interceptor run` opens these outside the namespace that its listeners are in. SocketType and its heirs fit.
OpenSocket: TypeAlias = Callable[[int, int], SocketType]

# Istio's sources of the inbound leg: capture rules tell "proxy to application" from "application to itself" by them.
PASSTHROUGH_V4: SockAddr = ("127.0.0.6", 0)
PASSTHROUGH_V6: SockAddr = ("::6", 0, 0, 0)
# With the default of 180 s, peers that vanish without a word are noticed in half an hour, as by ztunnel.
KEEPALIVE_COUNT = 9

STREAM = int(SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC)
UNDER_WAY = frozenset({0, errno.EINPROGRESS})


class UpstreamError(Exception):
    """A step of opening the upstream failed; the text names the step."""

    def __init__(self, step: str, number: int) -> None:
        self.errno = number
        super().__init__(f"{step}: {errno.errorcode.get(number, number)}")


def open_stream(open_socket: OpenSocket, destination: SockAddr, source: SockAddr | None, mark: int | None) -> SocketType:
    """A non-blocking TCP socket to `connect` to `destination` (in normal form).

    `source` None lets the kernel choose; otherwise its IP is kept and the port left to connect.
    Raises UpstreamError naming the step that failed.
    """
    step = "socket"
    sock: SocketType | None = None
    try:
        sock = open_socket(AF_INET if len(destination) == 2 else AF_INET6, STREAM)
        # No Nagle delay on top of the peers' own. Keepalive can wait until it is known that the flow will last: see sweep.
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        if mark is not None:
            step = "SO_MARK"
            set_mark(sock, mark)
        if source is not None:
            step = f"source {source[0]}"
            if source not in (PASSTHROUGH_V4, PASSTHROUGH_V6):
                set_transparent(sock)
                set_freebind(sock)
            set_late_port(sock)
            sock.bind(source)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise UpstreamError(step, error.errno or errno.EIO) from error
    return sock


def connect(sock: SocketType, destination: SockAddr) -> None:
    """Set `sock` on its way: it is writable once it is there, or failed. Raises UpstreamError, with `sock` closed."""
    number = sock.connect_ex(destination)
    if number not in UNDER_WAY:
        sock.close()
        raise UpstreamError("connect", number)


def connect_error(upstream: SocketType) -> int:
    """Why a connection that is in trouble was never there; 0 when it was, and broke since.

    A server that greets and resets at once was there: its greeting waits, and the client would have had it without us.
    Peeking does not take the error from behind the bytes, as SO_ERROR would.
    """
    try:
        upstream.recv(1, MSG_PEEK)
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def dial_datagram(open_socket: OpenSocket, destination: Address, mark: int | None) -> SocketType:
    """A non-blocking UDP socket connected to `destination`. Raises UpstreamError."""
    step = "socket"
    sock: SocketType | None = None
    try:
        sock = open_socket(destination.family, socket.SOCK_DGRAM)
        sock.setblocking(False)
        if mark is not None:
            step = "SO_MARK"
            set_mark(sock, mark)
        step = "connect"
        with suppress(BlockingIOError):
            sock.connect(destination.sockaddr)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise UpstreamError(step, error.errno or errno.EIO) from error
    return sock


def notice_dead_peer(sock: SocketType | None, keepalive_s: float, count: int = KEEPALIVE_COUNT) -> None:
    """Have the kernel ask a peer that was silent for `keepalive_s`, and `count` times again, whether it is still there."""
    if sock is None:
        return
    seconds = max(1, round(keepalive_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
    sock.setsockopt(IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
    sock.setsockopt(IPPROTO_TCP, socket.TCP_KEEPCNT, count)
