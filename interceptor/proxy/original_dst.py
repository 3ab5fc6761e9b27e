"""Where a captured connection was going. The mode is known from the listener, so nothing is guessed, and nothing falls back.

Two conditions are errors with names: the kernel has no entry, and the entry is ourselves (dialled directly, would loop).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import lru_cache
from socket import SOL_IP, SocketType, inet_ntoa

from interceptor.bpf.connect import Originals
from interceptor.proxy.settings import Listener
from interceptor.sockets import (
    SO_ORIGINAL_DST,
    SOCKADDR_IN_SIZE,
    IpAddress,
    SockAddr,
    address,
    normal,
    original_dst_v6,
    sockaddr_text,
)

# ENOENT: conntrack is there and does not know the connection. ENOPROTOOPT: it is not loaded for this family (mitmproxy#7272).
NO_ENTRY_ERRNOS = frozenset({errno.ENOENT, errno.ENOPROTOOPT})


class NoOriginalDst(Exception):
    """The original destination is not known, or must not be dialled. `reason` names the condition in records and counters."""

    reason = "original_dst_failed"


class NoConntrackEntry(NoOriginalDst):
    """A connection at a REDIRECT listener that conntrack has not redirected: dialled directly, or conntrack is off."""

    reason = "no_conntrack_entry"


class ClientGone(NoOriginalDst):
    """The client reset the connection before it was accepted, and conntrack has forgotten it: nobody's mistake."""

    reason = "client_gone"


class NotRewritten(NoOriginalDst):
    """A connection at a `connect` listener that was given no other address when it was made: dialled directly."""

    reason = "no_map_entry"


class DirectDial(NoOriginalDst):
    """The destination is one of our own ports on one of our own addresses: dialling it would loop."""

    reason = "direct_dial"

    def __init__(self, destination: SockAddr) -> None:
        super().__init__(f"{sockaddr_text(destination)} is the proxy itself")


def original_dst_of(listener: Listener, originals: Originals | None = None) -> Callable[[SocketType], SockAddr]:
    """What tells the original destination, in normal form, of a connection accepted by `listener`; for the mode `connect`, as
    `originals` know it.

    It raises NoConntrackEntry, NotRewritten, ClientGone, or OSError for what else the kernel answers.
    """
    if listener.mode == "tproxy":
        return _local_address
    if originals is not None:
        return lambda sock: _rewritten(sock, originals)
    if listener.family == "dual":
        return _redirected_dual
    return _redirected_v4 if listener.family == "v4" else _redirected_v6


def _local_address(sock: SocketType) -> SockAddr:
    return normal(sock.getsockname())


def _redirected_v4(sock: SocketType) -> SockAddr:
    try:
        raw = sock.getsockopt(SOL_IP, SO_ORIGINAL_DST, SOCKADDR_IN_SIZE)
    except OSError as error:
        raise _explained(sock, error) from error
    return _sockaddr_in(raw[2:8])


@lru_cache(1024)  # connections go to few places: most are one object
def _sockaddr_in(raw: bytes) -> SockAddr:
    return (inet_ntoa(raw[2:6]), raw[0] << 8 | raw[1])


def _redirected_v6(sock: SocketType) -> SockAddr:
    try:
        return original_dst_v6(sock)
    except OSError as error:
        raise _explained(sock, error) from error


def _redirected_dual(sock: SocketType) -> SockAddr:
    # A v4-mapped peer is an IPv4 connection to conntrack, whatever the socket's family.
    return _redirected_v4(sock) if len(_local_address(sock)) == 2 else _redirected_v6(sock)


def _explained(sock: SocketType, error: OSError) -> Exception:
    if error.errno in NO_ENTRY_ERRNOS:
        if _is_gone(sock):
            return ClientGone("reset by the client before it was accepted")
        return NoConntrackEntry(f"{errno.errorcode[error.errno]}: not redirected here, or conntrack is off")
    return error


def _is_gone(sock: SocketType) -> bool:
    try:
        sock.getpeername()
    except OSError:  # ENOTCONN: closed by a reset, net/ipv4/af_inet.c
        return True
    return False


def _rewritten(sock: SocketType, originals: Originals) -> SockAddr:
    if _is_gone(sock):
        raise ClientGone("reset by the client before it was accepted")
    client, local = sock.getpeername(), sock.getsockname()
    found = originals.find(client, local)
    # A client that is gone may have been followed by another from the same port: only while it lives is the entry its own.
    if _is_gone(sock):
        raise ClientGone("reset by the client while it was accepted")
    if found is None:
        raise NotRewritten("not rewritten when it was connected, or long ago")
    originals.forget(client, local)
    return normal(found.address)


def refuse_loop(destination: SockAddr, own_ports: frozenset[int], is_local: Callable[[IpAddress], bool]) -> None:
    """Raise DirectDial when dialling `destination` would reach the proxy itself.

    With nat rules loaded, SO_ORIGINAL_DST of a connection that was not redirected is its own address.
    """
    if destination[1] in own_ports and is_local(address(destination).ip):
        raise DirectDial(destination)
