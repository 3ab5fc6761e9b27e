"""The structs of interceptor/bpf/src/flows.h as Python sees them: change both or neither. No I/O.

Numbers are the machine's own byte order; addresses and ports the network's, IPv4 v4-mapped (RFC 4291 2.5.5.2).
"""

from __future__ import annotations

import ipaddress
import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from interceptor.sockets import Address, unmapped

TUPLE = struct.Struct("!16s16sHH")
COOKIE = struct.Struct("=Q")
PORT = struct.Struct("=I")
LIMIT = struct.Struct("=I")
FLOW = struct.Struct("=QQQQ36s36s8I4H9B7x")
NEW_FLOW = struct.Struct("=Q132xHHBxxB4xB7x")
PATH = struct.Struct("=QQQQ36sIIIIIIIIIBBBBBBBx")
FLOW_READ = struct.Struct("=Q8xQQ36s36sI8xI12xI12xBB2xB7x")
PATH_READ = struct.Struct("=QQQ48xI24xI8x")
EVENT = struct.Struct("=QQQQQ36s36sIII4x")
ACCEPTED_SIZE = 128
ACCEPTED_MODE_AT = 112
FLOW_ENDS_AT, FLOW_STATE_AT, FLOW_REASON_AT = 132, 148, 149
SIZES = {"flows": FLOW.size, "paths": PATH.size, "accepted": ACCEPTED_SIZE}
MAPPED = b"\0" * 10 + b"\xff\xff"


class Mode(IntEnum):
    """What an accepted socket may say before its flow is armed."""

    OPEN = 0
    LIMITED = 1
    OPENING = 2


class State:
    """Where a flow stands. Plain numbers: an enum costs up to a microsecond at every use (Python 3.11), on every flow's way."""

    CONNECTING: Final = 0
    ARMED: Final = 1
    REFUSED: Final = 2
    ENDED: Final = 3


class Asked(IntFlag):
    """What we ask of a flow."""

    FORWARDS = 1
    HELD = 2


class Ends:
    """How the directions of a flow have ended: bits, plain for the same reason."""

    UP_FIN: Final = 1
    DOWN_FIN: Final = 2
    UP_FIN_ACKED: Final = 4
    DOWN_FIN_ACKED: Final = 8
    UP_RST: Final = 16
    DOWN_RST: Final = 32
    REPORTED: Final = 64


RST = Ends.UP_RST | Ends.DOWN_RST
REFUSALS = {
    1: "no_handshake",
    2: "timestamps",
    3: "ecn",
    4: "mss",
    5: "early_data",
    6: "route",
    7: "map_full",
}


class Event(NamedTuple):
    """struct event: a flow has ended. Times are CLOCK_MONOTONIC nanoseconds."""

    flow: int
    sent: int
    received: int
    ended_ns: int
    client_cookie: int
    client: bytes
    server: bytes
    ends: int
    client_ifindex: int
    server_ifindex: int


class FlowEntry(NamedTuple):
    """struct flow, as far as user space reads it; in the order of FLOW_READ."""

    client_cookie: int
    armed_ns: int
    ended_ns: int
    client: bytes
    server: bytes
    isn: int
    ifindex: int
    ends: int
    state: int
    reason: int
    worker: int


class PathEntry(NamedTuple):
    """struct path, as far as user space reads it; in the order of PATH_READ."""

    flow: int
    seen_ns: int
    sent: int
    acked: int
    ifindex: int


def unpack_tuple(raw: bytes) -> tuple[Address, Address]:
    """(source, destination) of a struct tuple."""
    source, destination, source_port, destination_port = TUPLE.unpack(raw)
    return _address(source, source_port), _address(destination, destination_port)


def _address(raw: bytes, port: int) -> Address:
    return Address(unmapped(ipaddress.IPv6Address(raw)), port)


class Client(NamedTuple):
    """What user space knows of the client's leg: MSS, window and its scale, as the client said."""

    cookie: int
    mss: int
    window: int
    scale: int


def pack_flow(client: Client, asked: Asked, worker: int) -> bytes:
    """A new struct flow."""
    return NEW_FLOW.pack(client.cookie, client.mss, client.window, client.scale, asked, worker)


def unpack_flow(raw: bytes) -> FlowEntry:
    """A struct flow that came back."""
    return FlowEntry._make(FLOW_READ.unpack(raw))


def unpack_path(raw: bytes) -> PathEntry:
    """A struct path."""
    return PathEntry._make(PATH_READ.unpack(raw))


def unpack_event(raw: bytes) -> Event:
    """A struct event."""
    return Event._make(EVENT.unpack(raw))
