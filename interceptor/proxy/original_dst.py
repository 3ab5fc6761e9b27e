"""Where a captured connection was going. The mode is known from the listener, so nothing is guessed, and nothing falls back.

Two conditions are errors with names: the kernel has no entry, and the entry is ourselves (dialled directly, would loop).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from interceptor.proxy.settings import Mode
from interceptor.sockets import IpAddress, SockAddr, address, normal, original_dst_v4, original_dst_v6, sockaddr_text

# ENOENT: conntrack is there and does not know the connection. ENOPROTOOPT: it is not loaded for this family (mitmproxy#7272).
NO_ENTRY_ERRNOS = frozenset({errno.ENOENT, errno.ENOPROTOOPT})


class NoOriginalDst(Exception):
    """The original destination is not known, or must not be dialled. `reason` names the condition in records and counters."""

    reason = "original_dst_failed"


class NoConntrackEntry(NoOriginalDst):
    """A connection at a REDIRECT listener that conntrack has not redirected: dialled directly, or conntrack is off."""

    reason = "no_conntrack_entry"


class DirectDial(NoOriginalDst):
    """The destination is one of our own ports on one of our own addresses: dialling it would loop."""

    reason = "direct_dial"

    def __init__(self, destination: SockAddr) -> None:
        super().__init__(f"{sockaddr_text(destination)} is the proxy itself")


def original_dst(sock: socket.SocketType, mode: Mode) -> SockAddr:
    """The original destination of the accepted connection `sock`, in normal form.

    Raises NoConntrackEntry, or OSError for what else the kernel answers.
    """
    if mode == "tproxy":
        return normal(sock.getsockname())
    # A dual-stack listener's v4-mapped peer is an IPv4 connection to conntrack, whatever the socket's family.
    is_v4 = sock.family == socket.AF_INET or len(normal(sock.getsockname())) == 2
    try:
        return original_dst_v4(sock) if is_v4 else original_dst_v6(sock)
    except OSError as error:
        if error.errno in NO_ENTRY_ERRNOS:
            raise NoConntrackEntry(f"{errno.errorcode[error.errno]}: not redirected here, or conntrack is off") from error
        raise


def refuse_loop(destination: SockAddr, own_ports: frozenset[int], is_local: Callable[[IpAddress], bool]) -> None:
    """Raise DirectDial when dialling `destination` would reach the proxy itself.

    With nat rules loaded, SO_ORIGINAL_DST of a connection that was not redirected is its own address.
    """
    if destination[1] in own_ports and is_local(address(destination).ip):
        raise DirectDial(destination)
