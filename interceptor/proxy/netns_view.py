"""What the proxy must know about the network namespace its listeners are in, from wherever its thread is.

`interceptor run` has the listeners inside a namespace and the thread outside: so a view is taken once, inside, and kept.
"""

from __future__ import annotations

import os
import socket

from interceptor import netns
from interceptor.proxy.netlink import Netlink, listen_for_changes
from interceptor.proxy.owner import ProcessFinder


class NetnsView:
    """A network namespace, held open: that of the thread that makes the view."""

    def __init__(self) -> None:
        self._descriptor = os.open(netns.CURRENT, os.O_RDONLY | os.O_CLOEXEC)
        self._identity = netns.identity()
        self.netlink = Netlink()
        self.changes: socket.socket | None = listen_for_changes()
        self.finder = ProcessFinder(self._identity)

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
