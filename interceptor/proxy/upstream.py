"""Open the upstream half: from which address, with which mark. Opens sockets only through the seam it is given."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from interceptor.sockets import Address, set_freebind, set_late_port, set_mark, set_transparent

# The seam: `interceptor run` opens these outside the namespace that its listeners are in. socket.socket fits.
OpenSocket: TypeAlias = Callable[[socket.AddressFamily, socket.SocketKind], socket.socket]

# Istio's sources of the inbound leg: capture rules tell "proxy to application" from "application to itself" by them.
PASSTHROUGH_SOURCES = {4: Address(ipaddress.ip_address("127.0.0.6"), 0), 6: Address(ipaddress.ip_address("::6"), 0)}
# Peers that vanish without a word are noticed in half an hour, as by ztunnel (180 s, 180 s, 9).
KEEPALIVE_S = 180
KEEPALIVE_COUNT = 9


class UpstreamError(Exception):
    """A step of opening the upstream failed; the text names the step."""

    def __init__(self, step: str, number: int) -> None:
        self.errno = number
        super().__init__(f"{step}: {errno.errorcode.get(number, number)}")


def open_upstream(
    open_socket: OpenSocket, kind: socket.SocketKind, destination: Address, source: Address | None, mark: int | None
) -> socket.socket:
    """A non-blocking socket on its way to `destination`; writable (with SO_ERROR) once it is there, or not.

    `source` None lets the kernel choose; otherwise its IP is kept and the port left to connect.
    Raises UpstreamError naming the step that failed.
    """
    step = "socket"
    sock: socket.socket | None = None
    try:
        sock = open_socket(destination.family, kind)
        sock.setblocking(False)
        if kind == socket.SOCK_STREAM:
            tune_stream(sock)
        if mark is not None:
            step = "SO_MARK"
            set_mark(sock, mark)
        if source is not None:
            step = f"source {source.ip}"
            _bind_source(sock, source, kind)
        step = "connect"
        with suppress(BlockingIOError):  # EINPROGRESS
            sock.connect(destination.sockaddr)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise UpstreamError(step, error.errno or errno.EIO) from error
    return sock


def tune_stream(sock: socket.socket) -> None:
    """No Nagle delay on top of the peers' own, and dead peers noticed: for both halves. Accepted sockets inherit it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


def _bind_source(sock: socket.socket, source: Address, kind: socket.SocketKind) -> None:
    if source.ip not in (PASSTHROUGH_SOURCES[4].ip, PASSTHROUGH_SOURCES[6].ip):
        set_transparent(sock)
        set_freebind(sock)
    if kind == socket.SOCK_STREAM:
        set_late_port(sock)
    sock.bind(Address(source.ip, 0, source.scope).sockaddr)
