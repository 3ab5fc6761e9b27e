"""The flow record: one JSON line for each captured connection. Knows nothing of sockets."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring as quoted
from typing import Literal, NamedTuple

from interceptor.proxy.settings import Direction, Listener
from interceptor.sockets import SockAddr, sockaddr_text


class Lookup(NamedTuple):
    """A DNS question and what became of it. `by`: the resolver whose answer it was, or `cache`; None: nobody's."""

    name: str
    kind: str
    rcode: str
    answers: int
    by: str | None

    def to_json(self) -> str:
        """As a JSON object."""
        return (
            f'{{"name": {quoted(self.name)}, "type": "{self.kind}", "rcode": "{self.rcode}", '
            f'"answers": {self.answers}, "from": {_text(self.by)}}}'
        )


class Flow(NamedTuple):
    """One captured connection, from accept to end. A tuple: one is made for every connection, in its way.

    time is seconds since the epoch at accept. `sent` are bytes from client to upstream, `received` the other way.
    The owner (uid, pid, command) is the local end's: the client of an outbound flow, the application of an inbound one.
    connect_ms: from dialling to the destination's answer. relay: what moved the bytes; fallback: why no faster one did.
    dns_name: what name original_dst was the answer for, as far as went through our resolver. lookup: for DNS, what was asked.
    sni, alpn and host are what the client wrote (`--peek`), to be read with the mistrust that a client deserves.
    """

    time: float
    protocol: Literal["tcp", "udp"]
    direction: Direction
    listener: Listener
    client: SockAddr
    original_dst: SockAddr | None
    upstream_local: SockAddr | None
    sent: int
    received: int
    duration_ms: float
    reason: str
    error: str | None = None
    uid: int | None = None
    pid: int | None = None
    command: str | None = None
    relay: str | None = None
    connect_ms: float | None = None
    fallback: str | None = None
    sni: str | None = None
    alpn: str | None = None
    host: str | None = None
    dns_name: str | None = None
    lookup: Lookup | None = None

    def to_json(self) -> str:
        """The record as one line, without its newline. Fields that are not known are null.

        Written out by hand, for half of what json.dumps costs; the tests hold it to what json.loads reads.
        """
        # A field by its name is a call; taken apart, all of them are one step.
        # fmt: off
        (
            time, protocol, direction, listener, client, original_dst, upstream_local, sent, received, duration_ms, reason,
            error, uid, pid, command, relay, connect_ms, fallback, sni, alpn, host, dns_name, lookup,
        ) = self
        # fmt: on
        # Of most records these groups are null, and then the same text.
        if uid is None and pid is None and command is None:
            owner = NO_OWNER
        else:
            owner = f'"uid": {_number(uid)}, "pid": {_number(pid)}, "command": {_text(command)}'
        if sni is None and alpn is None and host is None and dns_name is None and lookup is None:
            names = NO_NAMES
        else:
            names = (
                f'"sni": {_text(sni)}, "alpn": {_text(alpn)}, "host": {_text(host)}, "dns_name": {_text(dns_name)}, '
                f'"dns": {"null" if lookup is None else lookup.to_json()}'
            )
        return (
            f'{{"time": "{rfc3339(time)}", {_origin(protocol, direction, listener)}, "client": {_address(client)}, '
            f'"original_dst": {_address(original_dst)}, "upstream_local": {_address(upstream_local)}, '
            f'"bytes_sent": {sent}, "bytes_received": {received}, "duration_ms": {duration_ms:.3f}, '
            f'"connect_ms": {"null" if connect_ms is None else f"{connect_ms:.3f}"}, {_outcome(reason, error)}, '
            f'{owner}, {_means(relay, fallback)}, {names}}}'
        )


NO_OWNER = '"uid": null, "pid": null, "command": null'
NO_NAMES = '"sni": null, "alpn": null, "host": null, "dns_name": null, "dns": null'


@lru_cache(64)
def _origin(protocol: str, direction: str, listener: Listener) -> str:
    return f'"protocol": "{protocol}", "direction": "{direction}", "listener": {quoted(str(listener))}'


@lru_cache(64)
def _outcome(reason: str, error: str | None) -> str:
    return f'"reason": {quoted(reason)}, "error": {_text(error)}'


@lru_cache(64)
def _means(relay: str | None, fallback: str | None) -> str:
    return f'"relay": {_text(relay)}, "fallback": {_text(fallback)}'


def _text(value: str | None) -> str:
    return "null" if value is None else quoted(value)


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)


def _address(value: SockAddr | None) -> str:
    if value is None:
        return "null"
    return f'"{value[0]}:{value[1]}"' if len(value) == 2 else f'"{sockaddr_text(value)}"'


def rfc3339(seconds: float) -> str:
    """`seconds` since the epoch in UTC, to the millisecond: 2026-11-22T10:00:00.123Z."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{_to_the_second(whole)}.{milliseconds:03d}Z"


@lru_cache(4)  # neighbouring records are of the same second
def _to_the_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "")


def errno_name(number: int) -> str:
    """ECONNRESET for 104."""
    return errno.errorcode.get(number, str(number))
