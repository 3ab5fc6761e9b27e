"""Where a captured connection was going. The mode is known from the listener, so nothing is guessed, and nothing falls back.

Two conditions are errors with names: the kernel has no entry, and the entry is ourselves (dialled directly, would loop).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from interceptor.bpf.connect import Originals
from interceptor.proxy.settings import Mode
from interceptor.sockets import Address, IpAddress, address, original_dst_v4, original_dst_v6

# ENOENT: conntrack is there and does not know the connection. ENOPROTOOPT: it is not loaded for this family (mitmproxy#7272).
NO_ENTRY_ERRNOS = frozenset({errno.ENOENT, errno.ENOPROTOOPT})


class NoOriginalDst(Exception):
    """The original destination is not known, or must not be dialled. `reason` names the condition in records and counters."""

    reason = "original_dst_failed"


class NoConntrackEntry(NoOriginalDst):
    """A connection at a REDIRECT listener that conntrack has not redirected: dialled directly, or conntrack is off."""

    reason = "no_conntrack_entry"


class NotRewritten(NoOriginalDst):
    """A connection at a `connect` listener that was given no other address when it was made: dialled directly."""

    reason = "no_map_entry"


class DirectDial(NoOriginalDst):
    """The destination is one of our own ports on one of our own addresses: dialling it would loop."""

    reason = "direct_dial"

    def __init__(self, destination: Address) -> None:
        self.destination = destination
        super().__init__(f"{destination} is the proxy itself")


def original_dst(sock: socket.socket, mode: Mode, originals: Originals | None = None) -> Address:
    """The original destination of the accepted connection `sock`; for the mode `connect`, as `originals` know it.

    Raises NoConntrackEntry, NotRewritten, or OSError for what else the kernel answers.
    """
    if mode == "tproxy":
        return address(sock.getsockname())
    if originals is not None:
        return _rewritten(sock, originals)
    # A dual-stack listener's v4-mapped peer is an IPv4 connection to conntrack, whatever the socket's family.
    is_v4 = sock.family == socket.AF_INET or address(sock.getsockname()).ip.version == 4
    try:
        return original_dst_v4(sock) if is_v4 else original_dst_v6(sock)
    except OSError as error:
        if error.errno in NO_ENTRY_ERRNOS:
            raise NoConntrackEntry(f"{errno.errorcode[error.errno]}: not redirected here, or conntrack is off") from error
        raise


def _rewritten(sock: socket.socket, originals: Originals) -> Address:
    client, local = sock.getpeername(), sock.getsockname()
    found = originals.find(client, local)
    if found is None:
        raise NotRewritten("not rewritten when it was connected, or long ago")
    # A client that is gone may have been followed by another from the same port: only while it lives is the entry its own.
    sock.getpeername()
    originals.forget(client, local)
    return address(found.address)


def refuse_loop(destination: Address, own_ports: frozenset[int], is_local: Callable[[IpAddress], bool]) -> None:
    """Raise DirectDial when dialling `destination` would reach the proxy itself.

    With nat rules loaded, SO_ORIGINAL_DST of a connection that was not redirected is its own address (peers.md 7).
    """
    if destination.port in own_ports and is_local(destination.ip):
        raise DirectDial(destination)
