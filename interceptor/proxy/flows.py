"""The flow record: one JSON line for each captured connection, and the counters. Knows nothing of sockets."""

from __future__ import annotations

import errno
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from interceptor.proxy.settings import Direction, Listener
from interceptor.sockets import Address


@dataclass(frozen=True, slots=True)
class Flow:
    """One captured connection, from accept to end.

    time is seconds since the epoch at accept. `sent` are bytes from client to upstream, `received` the other way.
    The owner (uid, pid, command) is the local end's: the client of an outbound flow, the application of an inbound one.
    """

    time: float
    protocol: Literal["tcp", "udp"]
    direction: Direction
    listener: Listener
    client: Address
    original_dst: Address | None
    upstream_local: Address | None
    sent: int
    received: int
    duration_ms: float
    reason: str
    error: str | None = None
    uid: int | None = None
    pid: int | None = None
    command: str | None = None

    def to_json(self) -> str:
        """The record as one line, without its newline. Fields that are not known are null."""
        return json.dumps(
            {
                "time": rfc3339(self.time),
                "protocol": self.protocol,
                "direction": self.direction,
                "listener": str(self.listener),
                "client": str(self.client),
                "original_dst": None if self.original_dst is None else str(self.original_dst),
                "upstream_local": None if self.upstream_local is None else str(self.upstream_local),
                "bytes_sent": self.sent,
                "bytes_received": self.received,
                "duration_ms": round(self.duration_ms, 3),
                "reason": self.reason,
                "error": self.error,
                "uid": self.uid,
                "pid": self.pid,
                "command": self.command,
            },
            ensure_ascii=False,
        )


@dataclass(slots=True)
class Counters:
    """What the proxy has counted since it started. `open` goes down again; the others never do."""

    accepted: int = 0
    open: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by reason: direct_dial, no_conntrack_entry, ...
    accept_errors: Counter[str] = field(default_factory=Counter)  # by errno name
    ended: Counter[str] = field(default_factory=Counter)  # by reason

    def as_json(self) -> dict[str, int | dict[str, int]]:
        """Plain values, for `json.dumps`."""
        by_reason = {"refused": self.refused, "accept_errors": self.accept_errors, "ended": self.ended}
        return {"accepted": self.accepted, "open": self.open} | {name: dict(counted) for name, counted in by_reason.items()}


def rfc3339(seconds: float) -> str:
    """`seconds` since the epoch in UTC, to the millisecond: 2026-11-22T10:00:00.123Z."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def errno_name(number: int) -> str:
    """ECONNRESET for 104."""
    return errno.errorcode.get(number, str(number))
