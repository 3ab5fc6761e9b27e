"""What the proxy must know about the network namespace its listeners are in, from wherever its thread is.

`interceptor run` has the listeners inside a namespace and the thread outside: so a view is taken once, inside, and kept.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from interceptor import netns
from interceptor.proxy.netlink import Netlink, listen_for_changes
from interceptor.proxy.owner import ProcessFinder

# What conntrack waits for after the first FIN, and after the other side has acknowledged it (Documentation/networking/
# nf_conntrack-sysctl.rst). /proc/sys/net shows the namespace of who reads.
HALF_CLOSED_TIMEOUTS = tuple(
    f"/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{state}" for state in ("fin_wait", "close_wait")
)


class NetnsView:
    """A network namespace, held open: that of the thread that makes the view.

    half_closed_timeout_s: after so long without a packet conntrack forgets a half-closed connection, and its NAT; None where
    it tracks none.
    """

    def __init__(self) -> None:
        self._descriptor = os.open(netns.CURRENT, os.O_RDONLY | os.O_CLOEXEC)
        self._identity = netns.identity()
        self.netlink = Netlink()
        self.changes: socket.socket | None = listen_for_changes()
        self.finder = ProcessFinder(self._identity)
        self.half_closed_timeout_s = _half_closed_timeout_s()

    def close(self) -> None:
        """Let the namespace go."""
        self.netlink.close()
        if self.changes is not None:
            self.changes.close()
        os.close(self._descriptor)

    def open_socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A socket inside the namespace."""
        if netns.identity() == self._identity:
            return socket.socket(family, kind)
        with netns.entered(f"/proc/self/fd/{self._descriptor}"):
            return socket.socket(family, kind)


def _half_closed_timeout_s() -> int | None:
    found = []
    for path in HALF_CLOSED_TIMEOUTS:
        with suppress(OSError), open(path, encoding="ascii") as file:
            found.append(int(file.read()))
    return min(found, default=None)
