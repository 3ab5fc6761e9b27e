"""A small HTTP/1.1 server, bounded in connections, bytes and time; in a thread, or a turn at a time. Knows no endpoint.

One answer a connection, then it is closed. Whoever is slow loses its connection, and nobody waits for it.
"""

from __future__ import annotations

import ipaddress
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, EVENT_WRITE
from typing import TypeAlias

from interceptor.proxy.http_head import NotHttp, is_complete, request_line
from interceptor.sockets import reset_on_close

# Prometheus, two kubelet probes and somebody with curl: a few. One more displaces the one that has been there longest.
MAX_CONNECTIONS = 16
# curl sends 80 bytes, Prometheus 300.
MAX_HEAD = 8192
# From accept to the last byte of the answer; Prometheus's own default patience is 10 s, the kubelet's 1 s.
DEADLINE_S = 5.0
BACKLOG = 64
CHUNK = 65536
REASONS = {200: "OK", 202: "Accepted", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed"} | {
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, and whether by somebody on this network namespace's own loopback interface."""

    method: str
    path: str
    is_local: bool


@dataclass(frozen=True, slots=True)
class Response:
    """An answer. `allow`: the methods there are, for a 405."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    allow: str = ""


Handler: TypeAlias = Callable[[Request], Response]


def encode(response: Response, method: str) -> bytes:
    """The bytes of an answer; without the body for HEAD."""
    lines = [
        f"HTTP/1.1 {response.status} {REASONS[response.status]}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *([f"Allow: {response.allow}"] if response.allow else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + (b"" if method == "HEAD" else response.body)


class AdminHttp:
    """Serves `listeners` with `handler`, one request at a time: in a thread (`start`), or whenever `turn` is called."""

    def __init__(self, listeners: list[socket.socket], handler: Handler) -> None:
        self._handler = handler
        self._listeners = listeners
        self._closing = False
        self._selector = selectors.EpollSelector()
        self._connections: dict[_Connection, None] = {}  # in the order they came
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, EVENT_READ)
        for listener in listeners:
            listener.setblocking(False)
            self._selector.register(listener, EVENT_READ, listener)
        self._thread = threading.Thread(target=self._serve, name="admin", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and close the listeners with all connections."""
        if self._thread.is_alive():
            self._closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        for connection in list(self._connections):
            self._end(connection)
        self._close_own()

    def abandon(self) -> None:
        """In a child process: close what was inherited, and leave all as it is to the parent, which shares the epoll set."""
        for connection in self._connections:
            connection.sock.close()
        self._close_own()

    def _close_own(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        os.close(self._wake)

    def fileno(self) -> int:
        """Readable when there is something for `turn` to do."""
        return self._selector.fileno()

    def turn(self, timeout_s: float | None = 0.0) -> float | None:
        """Do what there is to do, waiting for it up to `timeout_s`; after how many seconds to call again at the latest."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Connection):
                if key.data in self._connections:
                    self._step(key.data)
            elif key.data is not None:
                self._accept(key.data)
        now = time.monotonic()
        for connection in [each for each in self._connections if each.deadline <= now]:
            self._end(connection)
        first = next(iter(self._connections), None)
        return None if first is None else max(0.0, first.deadline - now)

    def _serve(self) -> None:
        timeout_s: float | None = None
        while not self._closing:
            timeout_s = self.turn(timeout_s)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors: the data path needs them more. Waiting takes the spin out of a readable listener.
            time.sleep(0.1)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._end(next(iter(self._connections)))
        sock.setblocking(False)
        connection = _Connection(sock, time.monotonic() + DEADLINE_S)
        self._connections[connection] = None
        self._selector.register(sock, EVENT_READ, connection)

    def _step(self, connection: _Connection) -> None:
        try:
            over = connection.step(self._handler)
        except BlockingIOError:
            return
        except OSError:
            over = True  # the peer's problem
        if over:
            self._end(connection)
        else:
            self._selector.modify(connection.sock, connection.waits_for, connection)

    def _end(self, connection: _Connection) -> None:
        del self._connections[connection]
        with suppress(KeyError):
            self._selector.unregister(connection.sock)
        if connection.is_stuck:
            reset_on_close(connection.sock)  # or the kernel would keep the rest of the answer for minutes
        connection.sock.close()


class _Connection:
    """One request on its way in, then one answer on its way out, then the wait for the peer's end."""

    __slots__ = ("_answer", "_head", "deadline", "sock", "waits_for")

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.waits_for = EVENT_READ
        self._head = b""
        self._answer: memoryview | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether the peer has not taken the answer."""
        return self.waits_for == EVENT_WRITE

    def step(self, handler: Handler) -> bool:
        """Go on as far as the socket allows; True when all is done. Raises OSError."""
        if self._answer is None:
            received = self.sock.recv(MAX_HEAD)
            if not received:
                return True
            self._head += received
            answer = self._ready_answer(handler)
            if answer is None:
                return False
            self._answer = memoryview(answer)
        elif self.waits_for == EVENT_READ:
            # All is sent. Closing while the peer still sends would reset it, and the answer might be lost on its way.
            return not self.sock.recv(CHUNK)
        self.waits_for = EVENT_WRITE
        while self._answer:
            self._answer = self._answer[self.sock.send(self._answer[:CHUNK]) :]
        self.sock.shutdown(socket.SHUT_WR)
        self.waits_for = EVENT_READ
        return False

    def _ready_answer(self, handler: Handler) -> bytes | None:
        try:
            line = request_line(self._head)
        except NotHttp:
            return encode(Response(400, b"this is no HTTP/1 request\n"), "GET")
        if line is not None and is_complete(self._head):
            path = line.target.decode("ascii", "replace").partition("?")[0]
            return encode(handler(Request(line.method, path, self._is_local())), line.method)
        if len(self._head) >= MAX_HEAD:
            return encode(Response(431, b"the head of this request is too long\n"), "GET")
        return None

    def _is_local(self) -> bool:
        # Both ends: an own address that is not loopback can be had from outside too.
        ends = (self.sock.getsockname()[0], self.sock.getpeername()[0])
        addresses = [ipaddress.ip_address(end.partition("%")[0]) for end in ends]
        return all((getattr(each, "ipv4_mapped", None) or each).is_loopback for each in addresses)
