"""Echo servers that say who answered and what they know of the connection: one thread and one selector for all of them.

TCP: one JSON line after accept, then whatever comes is echoed. UDP: the same line for each datagram, from the address
that the datagram was sent to.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.rig.connecting import original_of
from tests.rig.net import Pod
from tests.rig.sockets import (
    IP_RECVORIGDSTADDR,
    IPV6_RECVORIGDSTADDR,
    SO_ORIGINAL_DST,
    identity,
    join,
    name_of,
    open_socket,
    set_transparent,
    split,
)

IP_PKTINFO = 8  # linux/in.h
WILDCARDS = {"v4": "0.0.0.0", "v6": "::"}


@dataclass(frozen=True, slots=True)
class Server:
    """Who serves: the name in its answers, where it lives, whose it is."""

    name: str
    pod: Pod
    uid: int
    transparent: bool = False  # may get what TPROXY brings, and answer UDP from foreign addresses
    resets: bool = False  # answers each connection with RST, as a server that dies does


class Servers:
    """The thread and its sockets. `seen` counts connections and datagrams by server, before they are answered."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._pending: list[tuple[socket.socket, Callable[[socket.socket], None]]] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="echo servers")

    def listen(self, server: Server, *ports: int, protos: tuple[str, ...] = ("tcp", "udp"), address: str | None = None) -> None:
        """Serve these ports, on every address of both families unless one is given."""
        for host in (address,) if address else WILDCARDS.values():
            for port in ports:
                if "tcp" in protos:
                    self._add(_listening(server, join(host, port)), lambda sock, who=server: self._accept(sock, who))
                if "udp" in protos:
                    self._add(_receiving(server, join(host, port)), lambda sock, who=server: self._receive(sock, who))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close every socket."""
        self._wake.close()
        self._thread.join(timeout=5)
        assert not self._thread.is_alive(), "the echo servers' thread hangs"

    def _add(self, sock: socket.socket, ready: Callable[[socket.socket], None]) -> None:
        with self._lock:
            self._pending.append((sock, ready))
        self._wake.send(b".")

    def _serve(self) -> None:
        running = True
        while running:
            for key, _ in self._selector.select():
                if key.data is not None:
                    key.data(key.fileobj)
                elif self._woken.recv(64):
                    self._take_pending()
                else:
                    running = False
        self._take_pending()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _take_pending(self) -> None:
        with self._lock:
            taken, self._pending = self._pending, []
        for sock, ready in taken:
            self._selector.register(sock, selectors.EVENT_READ, ready)

    def _accept(self, listener: socket.socket, server: Server) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):
            # The accepted socket's owner is who accepts, not who listens.
            with identity(server.uid, server.uid):
                connection, peer = listener.accept()
            connection.setblocking(False)
            self.seen[server.name] += 1
            if server.resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                connection.close()
                return
            try:
                connection.send(_line(server, name_of(connection.getsockname()), name_of(peer), _original_dst(connection)))
            except OSError:
                connection.close()
                return
            self._selector.register(connection, selectors.EVENT_READ, self._echo)

    def _echo(self, connection: socket.socket) -> None:
        try:
            payload = connection.recv(65536)
            if payload:
                connection.send(payload)
                return
        except OSError:
            pass
        self._selector.unregister(connection)
        connection.close()

    def _receive(self, sock: socket.socket, server: Server) -> None:
        with suppress(BlockingIOError):
            payload, control, _, peer = sock.recvmsg(2048, 512)
            if not payload:
                return
            self.seen[server.name] += 1
            local = _sent_to(control)
            line = _line(server, local, name_of(peer), local)
            with suppress(OSError):
                if server.transparent and split(local)[1] != sock.getsockname()[1]:
                    _answer_from(server, local, line, peer)
                else:
                    sock.sendmsg([line], [_from_address(split(local)[0])], 0, peer)


def _listening(server: Server, where: str) -> socket.socket:
    sock = _own(server, socket.SOCK_STREAM, where)
    sock.listen(512)
    return sock


def _receiving(server: Server, where: str) -> socket.socket:
    sock = _own(server, socket.SOCK_DGRAM, where)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.SOL_IP, IP_RECVORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, 1)
    return sock


def _own(server: Server, kind: socket.SocketKind, where: str) -> socket.socket:
    sock = open_socket(server.pod, kind, where, uid=server.uid, gid=server.uid)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if server.transparent:
        set_transparent(sock)
    sock.bind(split(where))
    sock.setblocking(False)
    return sock


def _line(server: Server, local: str, peer: str, original_dst: str) -> bytes:
    said = {"server": server.name, "local": local, "peer": peer, "original_dst": original_dst}
    return json.dumps(said).encode() + b"\n"


def _original_dst(connection: socket.socket) -> str:
    rewritten = original_of(connection)
    if rewritten is not None:
        return rewritten
    try:
        if connection.family == socket.AF_INET:
            return _decode(connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
        return _decode(connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
    except OSError:
        # No conntrack entry: nothing was translated.
        return name_of(connection.getsockname())


def _decode(sockaddr: bytes) -> str:
    (family,) = struct.unpack_from("=H", sockaddr)
    (port,) = struct.unpack_from("!H", sockaddr, 2)
    start, length = (4, 4) if family == socket.AF_INET else (8, 16)
    return join(socket.inet_ntop(family, sockaddr[start : start + length]), port)


def _sent_to(control: list[tuple[int, int, bytes]]) -> str:
    wanted = {(socket.SOL_IP, IP_RECVORIGDSTADDR), (socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR)}
    return next(_decode(value) for level, kind, value in control if (level, kind) in wanted)


def _from_address(address: str) -> tuple[int, int, bytes]:
    # struct in_pktinfo and in6_pktinfo, linux/in.h and linux/ipv6.h
    if ":" in address:
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, socket.inet_pton(socket.AF_INET6, address) + struct.pack("=i", 0)
    return socket.SOL_IP, IP_PKTINFO, struct.pack("=i", 0) + socket.inet_aton(address) + bytes(4)


def _answer_from(server: Server, source: str, line: bytes, peer: tuple[object, ...]) -> None:
    with open_socket(
        server.pod, socket.SOCK_DGRAM, source, uid=server.uid, gid=server.uid, source=source, transparent=True
    ) as sock:
        sock.sendto(line, peer)


@contextmanager
def serving() -> Iterator[Servers]:
    """Running servers, stopped and closed at the end."""
    servers = Servers()
    servers.start()
    try:
        yield servers
    finally:
        servers.stop()
