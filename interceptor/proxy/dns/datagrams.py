"""DNS clients over UDP: one listener's queries in, answers out, from the address that was asked. Reads no message.

With REDIRECT, conntrack then gives the answer the source that the application expects. Which server the application asked
cannot be had: SO_ORIGINAL_DST is for TCP and SCTP (nf_conntrack_proto.c, getorigdst).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from select import EPOLLIN
from typing import Any

from interceptor.proxy.dns.resolver import Question, Resolver
from interceptor.proxy.listeners import BoundListener, Protocol
from interceptor.proxy.metrics import REFUSED
from interceptor.proxy.runtime import Runtime
from interceptor.sockets import Ancillary, address, arrival_interface, normal, reply_from_same

MAX_MESSAGE = 65535
ANCILLARY_SIZE = 256
BATCH = 32
# What is captured comes from here, over and over: asking the kernel whether an address is ours costs more than an answer
# from the cache.
LOOPBACK = frozenset({"127.0.0.1", "::1"})
MAX_REMEMBERED = 256


class DnsDatagrams:
    """One UDP listener's queries. Those of other hosts are dropped: a port that answers anybody is an amplifier."""

    protocol: Protocol = "udp"

    def __init__(self, runtime: Runtime, bound: BoundListener, resolver: Resolver) -> None:
        self.listener = bound.listener
        self._runtime = runtime
        self._sock = bound.sock
        self._resolver = resolver
        self._is_local = bound.view.netlink.is_local
        self._known: set[str] = set()
        runtime.loop.watch(bound.sock.fileno(), EPOLLIN, self._ready)

    def close(self) -> None:
        """Nothing is open here: the resolver has what waits."""

    def deliver(self, response: bytes, to: Any) -> None:
        """Send `response` to whom and from where `to` says."""
        source, asker = to
        self._sock.sendmsg([response], source, 0, asker)

    def _ready(self, _events: int) -> None:
        sock, resolver = self._sock, self._resolver
        for _ in range(BATCH):
            try:
                message, ancillary, _flags, asker = sock.recvmsg(MAX_MESSAGE, ANCILLARY_SIZE)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about an answer whose asker is gone
            sender = normal(asker)
            if sender[0] not in LOOPBACK and not self._may_ask(sender[0], asker, ancillary):
                self._runtime.counts.add(REFUSED, "dns_from_elsewhere")
                continue
            resolver.ask(Question(self, sender, (reply_from_same(ancillary), asker), message))

    def _may_ask(self, host: str, asker: Any, ancillary: Iterable[Ancillary]) -> bool:
        if host in self._known:
            return True
        # One of ours, who was captured on the way out; or a container behind an interface that is captured.
        interfaces = self._runtime.settings.virtual_interfaces
        if self._is_local(address(asker).ip):
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known.add(host)
            return True
        return bool(interfaces) and _name(arrival_interface(ancillary)) in interfaces


def _name(interface: int) -> str:
    try:
        return socket.if_indextoname(interface)
    except OSError:
        return ""  # gone meanwhile
