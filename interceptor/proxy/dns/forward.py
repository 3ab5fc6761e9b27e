"""Forward captured DNS queries over UDP to a resolver, and its answers back. Reads nothing in them.

The TCP half is an ordinary flow whose destination is the resolver (server.py). The address the query arrived at is the one the
answer leaves from: with REDIRECT, conntrack then gives it the source that the application expects.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from dataclasses import dataclass
from select import EPOLLIN
from typing import Any

from interceptor.errors import ProxyError
from interceptor.proxy.flows import Flow, errno_name
from interceptor.proxy.listeners import BoundListener
from interceptor.proxy.loop import Scheduled
from interceptor.proxy.metrics import DNS_QUERIES, REFUSED
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.upstream import UpstreamError
from interceptor.sockets import Address, Ancillary, normal, reply_from_same

MAX_MESSAGE = 65535
ANCILLARY_SIZE = 256
BATCH = 32
# A stub resolver asks again after 5 s (resolv.conf(5), "timeout"): by then the first question is answered or lost.
ANSWER_TIMEOUT_S = 5.0
# Each waiting query has a socket of its own, hence a random port, which is half of a DNS answer's authenticity (RFC 5452).
MAX_WAITING = 1024
DNS_PORT = 53


def parse_resolver(text: str) -> Address:
    """`ip`, `ip:port`, `[ip]:port`; the port is 53 unless given. Raises ProxyError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, str(DNS_PORT)
    try:
        return Address(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")), int(port))
    except ValueError as error:
        raise ProxyError(f"resolver {text!r} is neither an IP address nor ip:port") from error


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One query that waits for its answer."""

    upstream: socket.SocketType
    asker: Any  # a socket address as recvmsg gives it and sendmsg takes it
    source: list[Ancillary]
    size: int
    start: float  # time.monotonic()


class DnsForwarder:
    """One UDP listener's queries."""

    def __init__(self, runtime: Runtime, bound: BoundListener, resolver: Address) -> None:
        self._runtime = runtime
        self._bound = bound
        self._resolver = resolver
        self._waiting: dict[Query, Scheduled] = {}
        runtime.loop.watch(bound.sock.fileno(), EPOLLIN, self._ready)

    def close(self) -> None:
        """Wait for no answer any more."""
        for query in list(self._waiting):
            self._end(query, 0, "drained", None)

    def _ready(self, _events: int) -> None:
        for _ in range(BATCH):
            try:
                message, ancillary, _flags, asker = self._bound.sock.recvmsg(MAX_MESSAGE, ANCILLARY_SIZE)
            except OSError:
                return  # nothing left; or an ICMP error about an answer whose asker is gone
            if len(self._waiting) >= MAX_WAITING:
                self._runtime.counts.add(REFUSED, "too_many_dns_queries")
            else:
                self._ask(message, asker, reply_from_same(ancillary))

    def _ask(self, message: bytes, asker: Any, source: list[Ancillary]) -> None:
        try:
            upstream = self._runtime.dial_datagram(self._resolver)
        except UpstreamError:
            self._runtime.counts.add(REFUSED, "dns_upstream_failed")
            return
        query = Query(upstream, asker, source, len(message), time.monotonic())
        loop = self._runtime.loop
        loop.watch(upstream.fileno(), EPOLLIN, lambda _events: self._answered(query))
        self._waiting[query] = loop.later(ANSWER_TIMEOUT_S, lambda: self._end(query, 0, "no_answer", None))
        try:
            upstream.send(message)
        except OSError as error:
            self._end(query, 0, "upstream_failed", errno_name(error.errno or 0))

    def _answered(self, query: Query) -> None:
        try:
            answer = query.upstream.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(query, 0, "upstream_failed", errno_name(error.errno or 0))
            return
        try:
            self._bound.sock.sendmsg([answer], query.source, 0, query.asker)
        except OSError as error:
            self._end(query, len(answer), "client_failed", errno_name(error.errno or 0))
            return
        self._end(query, len(answer), "closed", None)

    def _end(self, query: Query, received: int, reason: str, error: str | None) -> None:
        self._waiting.pop(query).cancel()
        self._runtime.counts.add(DNS_QUERIES, "answered" if reason == "closed" else reason)
        upstream_local = query.upstream.getsockname()
        self._runtime.loop.dispose(query.upstream)
        seconds = time.monotonic() - query.start
        self._runtime.record(
            Flow(
                time=time.time() - seconds,
                protocol="udp",
                direction="dns",
                listener=self._bound.listener,
                client=normal(query.asker),
                # REDIRECT keeps a datagram's first destination in conntrack, where only a connected socket could ask for it.
                original_dst=None,
                upstream_local=upstream_local,
                sent=query.size,
                received=received,
                duration_ms=seconds * 1000,
                reason=reason,
                error=error,
            )
        )
