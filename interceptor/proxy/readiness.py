"""Tell the capture rules that the proxy is ready: a datagram from it to its own host, which they know by its sender.

For `--before-proxy bypass` (docs/before-proxy.md). It needs no capability, and nobody receives it: where rules wait for it they
discard it, and the kernel tells the sender so.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from interceptor.sockets import set_mark

LOOPBACK = ("127.0.0.1", "::1")
# Rules that were lost and written again have forgotten it, or were not yet there: for so long, at most, traffic goes direct.
# As often as the node agent looks at its pods; two system calls a family.
AGAIN_S = 2.0


def addresses(own: Sequence[str]) -> tuple[str, ...]:
    """Where to announce, in order; `own` are the namespace's other addresses, for when lo has no IPv6 (disable_ipv6)."""
    return (*LOOPBACK, *(address for address in own if ":" in address))


def announce(to: Sequence[str], port: int, mark: int | None = None) -> tuple[str, ...]:
    """Announce that the proxy is ready, once for each family of `to`; the addresses for which some rule took it.

    `mark`: as the proxy's sockets have it. Whoever may not set it is perhaps known by something else.
    """
    taken: list[str] = []
    done: set[socket.AddressFamily] = set()
    for address in to:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        if family in done:
            continue
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                if mark is not None:
                    with suppress(PermissionError):
                        set_mark(sock, mark)
                if _is_taken(sock, (address, port)):
                    taken.append(address)
        except OSError:
            continue  # no such family, or address, here: perhaps the next
        done.add(family)
    return tuple(taken)


def _is_taken(sock: socket.socket, to: tuple[str, int]) -> bool:
    try:
        sock.sendto(b"ready", to)
    except PermissionError:
        return True  # discarded on its way out
    return False


class Readiness:
    """Announces, and announces again, as long as the proxy lives. It never takes it back: see docs/before-proxy.md."""

    def __init__(
        self, later: Callable[[float, Callable[[], None]], object], to: Sequence[str], port: int, mark: int | None
    ) -> None:
        self._later = later
        self._to = to
        self._port = port
        self._mark = mark

    def begin(self) -> None:
        """The proxy is ready now. In its own thread and as its own user."""
        announce(self._to, self._port, self._mark)
        self._later(AGAIN_S, self.begin)
