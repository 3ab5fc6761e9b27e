"""The flow record: one JSON line for each captured connection, and the counters. Knows nothing of sockets."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring as escaped  # what json.dumps(..., ensure_ascii=False) does to a string
from typing import Literal

from interceptor.proxy.settings import Direction, Listener
from interceptor.sockets import SockAddr, sockaddr_text

NULL = "null"


# Not frozen: that would cost 2 µs each, and there is one for each connection.
@dataclass(slots=True)
class Flow:
    """One captured connection, from accept to end.

    time is seconds since the epoch at accept. `sent` are bytes from client to upstream, `received` the other way.
    The owner (uid, pid, command) is the local end's: the client of an outbound flow, the application of an inbound one.
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
    relay: str | None = None  # what moved the bytes; None for a connection that never got so far

    def to_json(self) -> str:
        """The record as one line, without its newline. Fields that are not known are null."""
        # By hand: json.dumps would take four times as long, and only three of the fields may need escaping.
        to, local, error, command, relay = self.original_dst, self.upstream_local, self.error, self.command, self.relay
        return (
            f'{{"time": "{rfc3339(self.time)}", "protocol": "{self.protocol}", "direction": "{self.direction}", '
            f'"listener": "{self.listener}", "client": "{sockaddr_text(self.client)}", '
            f'"original_dst": {NULL if to is None else _quoted(to)}, '
            f'"upstream_local": {NULL if local is None else _quoted(local)}, '
            f'"bytes_sent": {self.sent}, "bytes_received": {self.received}, "duration_ms": {self.duration_ms:.3f}, '
            f'"reason": "{self.reason}", "error": {NULL if error is None else escaped(error)}, '
            f'"uid": {NULL if self.uid is None else self.uid}, "pid": {NULL if self.pid is None else self.pid}, '
            f'"command": {NULL if command is None else escaped(command)}, '
            f'"relay": {NULL if relay is None else escaped(relay)}}}'
        )


def _quoted(sockaddr: SockAddr) -> str:
    return f'"{sockaddr_text(sockaddr)}"'


@dataclass(slots=True)
class Counters:
    """What the proxy has counted since it started. `open` goes down again; the others never do."""

    accepted: int = 0
    open: int = 0
    adopted: int = 0  # flows that another process had accepted, and left
    refused: Counter[str] = field(default_factory=Counter)  # by reason: direct_dial, no_conntrack_entry, ...
    accept_errors: Counter[str] = field(default_factory=Counter)  # by errno name
    ended: Counter[str] = field(default_factory=Counter)  # by reason
    not_spliced: Counter[str] = field(default_factory=Counter)  # by reason: flows that the packet relay left to splice
    owners_skipped: int = 0  # flows without a uid because looking them all up would have cost too much

    def as_json(self) -> dict[str, int | dict[str, int]]:
        """Plain values, for `json.dumps`."""
        names = ("refused", "accept_errors", "ended", "not_spliced")
        by_reason: dict[str, Counter[str]] = {name: getattr(self, name) for name in names}
        plain: dict[str, int | dict[str, int]] = {"accepted": self.accepted, "open": self.open, "adopted": self.adopted}
        plain["owners_skipped"] = self.owners_skipped
        return plain | {name: dict(counted) for name, counted in by_reason.items()}


def rfc3339(seconds: float) -> str:
    """`seconds` since the epoch in UTC, to the millisecond: 2026-11-22T10:00:00.123Z."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{_whole_second(whole)}.{milliseconds:03d}Z"


@lru_cache(maxsize=4)
def _whole_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def errno_name(number: int) -> str:
    """ECONNRESET for 104."""
    return errno.errorcode.get(number, str(number))
