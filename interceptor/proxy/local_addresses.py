"""Whether an address is the namespace's own: asked of the kernel once, remembered until it says that something changed."""

from __future__ import annotations

from contextlib import suppress
from select import EPOLLIN

from interceptor.proxy.loop import Loop
from interceptor.proxy.netns_view import NetnsView
from interceptor.sockets import SockAddr, address

NOTICE_SIZE = 8192
# Clients come and go; so many are enough to answer for those that come often.
LIMIT = 4096


class LocalAddresses:
    """Of one namespace. Where its changes cannot be listened to, nothing is remembered."""

    def __init__(self, view: NetnsView, loop: Loop) -> None:
        self._view = view
        self._known: dict[str, bool] = {}
        if view.changes is not None:
            loop.watch(view.changes.fileno(), EPOLLIN, self._changed)

    def has(self, sockaddr: SockAddr) -> bool:
        """Whether the IP of `sockaddr`, in normal form, is local."""
        known = self._known.get(sockaddr[0])
        if known is None:
            known = self._view.netlink.is_local(address(sockaddr).ip)
            if self._view.changes is not None:
                if len(self._known) >= LIMIT:
                    self._known.clear()
                self._known[sockaddr[0]] = known
        return known

    def _changed(self, _events: int) -> None:
        assert self._view.changes is not None
        with suppress(OSError):  # ENOBUFS: notices were lost, which says that there were some
            self._view.changes.recv(NOTICE_SIZE)
        self._known.clear()
