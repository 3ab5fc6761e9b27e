"""Wait where the proxy would, and answer each packet with the original destination that it came with."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from interceptor import sockets
from interceptor.bpf.syscall import BpfError
from interceptor.probe.paths import Arrival
from interceptor.values import Family, Proto

# The proxy of ours answers these probes itself (see proxy/server.py); another program on the port does not.
GREETING_TIMEOUT_S = 2.0


@dataclass(slots=True)
class Waiting:
    """A listener at one of the proxy's ports; `trouble` says why there is none. `is_ours` False: the running proxy answers."""

    trouble: str | None = None
    is_ours: bool = True


@contextmanager
def at(arrival: Arrival) -> Iterator[Waiting]:
    """A listener at `arrival` for the length of the block, unless a program listens there already: that one is to answer."""
    family = socket.AF_INET if arrival.family is Family.V4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if arrival.proto is Proto.TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as waiting:
        try:
            _bind(waiting, arrival)
        except OSError as error:
            yield _without(error, arrival)
            return
        stop = threading.Event()
        serve = _serve_tcp if arrival.proto is Proto.TCP else _serve_udp
        thread = threading.Thread(target=serve, args=(waiting, arrival, stop), daemon=True)
        thread.start()
        try:
            yield Waiting()
        finally:
            stop.set()
            thread.join()


def _bind(waiting: socket.socket, arrival: Arrival) -> None:
    waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if arrival.family is Family.V6:
        waiting.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if arrival.mechanism == "tproxy":
        sockets.set_transparent(waiting)
    if arrival.proto is Proto.UDP:
        sockets.receive_original_dst(waiting)
        sockets.receive_local_address(waiting)
    waiting.bind(("0.0.0.0" if arrival.family is Family.V4 else "::", arrival.port))  # noqa: S104  # as the proxy does
    if arrival.proto is Proto.TCP:
        waiting.listen(8)
    waiting.settimeout(0.1)  # how often `stop` is looked at


def _without(error: OSError, arrival: Arrival) -> Waiting:
    if error.errno == errno.EADDRINUSE:
        if arrival.proto is Proto.TCP:
            return Waiting(is_ours=False)
        return Waiting(trouble=f"UDP port {arrival.port} is taken; probe before the proxy starts")
    return Waiting(trouble=f"listening on port {arrival.port}: {error.strerror}")


def _serve_tcp(waiting: socket.socket, arrival: Arrival, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            connection, _ = waiting.accept()
        except TimeoutError:
            continue
        with connection, contextlib.suppress(OSError, BpfError):
            connection.settimeout(GREETING_TIMEOUT_S)
            connection.sendall(f'{{"original_dst": "{_original(connection, arrival)}"}}\n'.encode())


def _original(connection: socket.socket, arrival: Arrival) -> str:
    if arrival.mechanism == "tproxy":
        return sockets.sockaddr_text(sockets.normal(connection.getsockname()))
    if arrival.mechanism == "connect":
        return _rewritten(connection)
    original_dst = sockets.original_dst_v4 if arrival.family is Family.V4 else sockets.original_dst_v6
    return sockets.sockaddr_text(original_dst(connection))


def _rewritten(connection: socket.socket) -> str:
    from interceptor.bpf import connect
    from interceptor.bpf.cookie import netns_cookie_of

    originals = connect.Originals(netns_cookie_of(connection))
    client, local = connection.getpeername(), connection.getsockname()
    try:
        found = originals.find(client, local)
        originals.forget(client, local)
    finally:
        originals.close()
    return sockets.sockaddr_text(sockets.normal(found.address if found else local))


def _serve_udp(waiting: socket.socket, arrival: Arrival, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            query, ancillary, _, client = waiting.recvmsg(512, 256)
        except TimeoutError:
            continue
        # REDIRECT leaves a datagram without its original destination; that it came up here is what can be known.
        original = sockets.original_dst_of(ancillary) if arrival.mechanism == "tproxy" else None
        told = str(original) if original else query.decode(errors="replace")
        answer = f'{{"original_dst": "{told}"}}\n'.encode()
        with contextlib.suppress(OSError):
            if original is None:
                waiting.sendmsg([answer], sockets.reply_from_same(ancillary), 0, client)
            else:
                _answer_as(original, answer, client)


def _answer_as(original: sockets.Address, answer: bytes, client: tuple[str, int]) -> None:
    """The application expects the answer from where it sent the query to."""
    with socket.socket(original.family, socket.SOCK_DGRAM) as transparent:
        transparent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sockets.set_transparent(transparent)
        transparent.bind(original.sockaddr)
        transparent.sendto(answer, client)
