"""Whose connections these are, as far as there is time to ask: looking each up must not cost the connections themselves.

The kernel is asked for uid and inode at once, since a short-lived client is gone when its flow ends; /proc for the process a
moment later, if the connection still lives.
"""

from __future__ import annotations

import socket
import time
from functools import lru_cache

from interceptor.proxy.netlink import SocketOwner
from interceptor.proxy.netns_view import NetnsView
from interceptor.proxy.owner import Process
from interceptor.sockets import SockAddr, address

# Lookups a second, 5 to 10 µs each: half a percent of a core. What is above has no uid in its record, and is counted.
RATE = 500
# Of the proxy's time, the part that searches in /proc may take: a process with many descriptors costs 1 µs for each of them.
SEARCH_SHARE = 0.01


@lru_cache(maxsize=1024)
def one(uid: int) -> int:
    """`uid`, as one object for all connections that note it: thousands wait, of few users."""
    return uid


class Owners:
    """One proxy's lookups."""

    def __init__(self, view: NetnsView) -> None:
        self._view = view
        self.credit = RATE  # lookups that may be made before it is renewed
        self._renewed_at = time.monotonic()
        self._search_not_before = 0.0

    def of_client(self, client: SockAddr, original_dst: SockAddr) -> SocketOwner | None:
        """Who opened the client's socket; None when there is none here, or no time.."""
        try:
            return self._view.netlink.connection_owner(client, original_dst)
        except OSError:
            return None  # stays unknown, and says so

    def of_application(self, original_dst: SockAddr) -> SocketOwner | None:
        """Who listens where the client was going. Costs one of `credit`."""
        self.credit -= 1
        try:
            return self._view.netlink.listener_owner(socket.IPPROTO_TCP, address(original_dst))
        except OSError:
            return None

    def renewed(self, now: float) -> bool:
        """Whether there is credit again; `now` is time.monotonic()."""
        if now < self._renewed_at + 1:
            return False
        self._renewed_at = now
        self.credit = RATE
        return True

    def may_search(self, now: float) -> bool:
        """Whether there is time for `process`."""
        return now >= self._search_not_before

    def process(self, owner: SocketOwner) -> Process | None:
        """The process with the socket open, if it can be found at a bearable cost."""
        start = time.monotonic()
        if not self.may_search(start):
            return None
        try:
            return self._view.finder.find(owner.inode)
        except OSError:
            return None  # out of descriptors: stays unknown
        finally:
            end = time.monotonic()
            self._search_not_before = end + (end - start) / SEARCH_SHARE
