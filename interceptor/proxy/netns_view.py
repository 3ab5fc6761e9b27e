"""What the proxy must know about the network namespace its listeners are in, from wherever its thread is.

`interceptor run` has the listeners inside a namespace and the thread outside: so a view is taken once, inside, and kept.
"""

from __future__ import annotations

import os
import socket

from interceptor import netns
from interceptor.proxy.netlink import Netlink, SocketOwner
from interceptor.proxy.owner import Process, ProcessFinder
from interceptor.sockets import Address, IpAddress


class NetnsView:
    """A network namespace, held open: that of the thread that makes the view."""

    def __init__(self) -> None:
        self._descriptor = os.open(netns.CURRENT, os.O_RDONLY | os.O_CLOEXEC)
        self._identity = netns.identity()
        self._netlink = Netlink()
        self._finder = ProcessFinder(self._identity)

    def close(self) -> None:
        """Let the namespace go."""
        self._netlink.close()
        os.close(self._descriptor)

    def is_local(self, ip: IpAddress) -> bool:
        """Whether `ip` is one of the namespace's own addresses."""
        return self._netlink.is_local(ip)

    def owner(self, protocol: int, local: Address, remote: Address) -> SocketOwner | None:
        """Who owns the namespace's socket with these two ends; None when there is none."""
        return self._netlink.owner(protocol, local, remote)

    def listener_owner(self, protocol: int, local: Address) -> SocketOwner | None:
        """Who listens on `local`; None when nobody does."""
        nowhere = Address(type(local.ip)(0), 0)
        return self._netlink.owner(protocol, local, nowhere)

    def process(self, inode: int) -> Process | None:
        """The process that has socket `inode` open, when it can be found cheaply."""
        return self._finder.find(inode)

    def open_socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A socket inside the namespace."""
        if netns.identity() == self._identity:
            return socket.socket(family, kind)
        with netns.entered(f"/proc/self/fd/{self._descriptor}"):
            return socket.socket(family, kind)
