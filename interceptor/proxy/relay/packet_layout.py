"""The structs of interceptor/bpf/src/flows.h as Python sees them: change both or neither. No I/O.

Numbers are the machine's own byte order; addresses and ports the network's, IPv4 v4-mapped (RFC 4291 2.5.5.2).
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from interceptor.sockets import Address, SockAddr, unmapped

TUPLE = struct.Struct("!16s16sHH")
TUPLE_SIZE = TUPLE.size
COOKIE = struct.Struct("=Q")
PORT = struct.Struct("=I")
LIMIT = struct.Struct("=I")
FLOW = struct.Struct("=QQQQ36s36s8I4H9B7x")
PATH = struct.Struct("=QQQ36sIIIIIIIIIBBBBBBBx")
EVENT = struct.Struct("=QQQQI4x")
ACCEPTED_SIZE = 96
ACCEPTED_MODE_AT = 76
FLOW_ENDS_AT, FLOW_STATE_AT, FLOW_REASON_AT, FLOW_WORKER_AT = 132, 148, 149, 152
SIZES = {"flows": FLOW.size, "paths": PATH.size, "accepted": ACCEPTED_SIZE}
MAPPED = b"\0" * 10 + b"\xff\xff"


class Mode(IntEnum):
    """What an accepted socket may say before its flow is armed."""

    OPEN = 0
    LIMITED = 1
    OPENING = 2


class State(IntEnum):
    """Where a flow stands."""

    CONNECTING = 0
    ARMED = 1
    REFUSED = 2
    ENDED = 3


class Asked(IntFlag):
    """What we ask of a flow."""

    FORWARDS = 1
    HELD = 2


class Ends(IntFlag):
    """How the directions of a flow have ended."""

    UP_FIN = 1
    DOWN_FIN = 2
    UP_FIN_ACKED = 4
    DOWN_FIN_ACKED = 8
    UP_RST = 16
    DOWN_RST = 32
    REPORTED = 64


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
    ends: int


@dataclass(frozen=True, slots=True)
class FlowEntry:
    """struct flow, as far as user space reads it."""

    client: bytes
    server: bytes
    isn: int
    ifindex: int
    state: State
    reason: int
    ends: Ends
    armed_ns: int
    ended_ns: int
    client_cookie: int
    worker: int


class PathEntry(NamedTuple):
    """struct path, as far as user space reads it."""

    flow: int
    seen_ns: int
    sent: int
    ifindex: int
    acked: int


def packed_ip(text: str) -> bytes:
    """16 bytes of an address as `getpeername` gives it."""
    if ":" in text:
        return ipaddress.IPv6Address(text.partition("%")[0]).packed
    return MAPPED + bytes(map(int, text.split(".")))


def pack_tuple(source: SockAddr, destination: SockAddr) -> bytes:
    """struct tuple of packets from `source` to `destination`."""
    return TUPLE.pack(packed_ip(source[0]), packed_ip(destination[0]), source[1], destination[1])


def unpack_tuple(raw: bytes) -> tuple[Address, Address]:
    """(source, destination) of a struct tuple."""
    source, destination, source_port, destination_port = TUPLE.unpack(raw)
    return _address(source, source_port), _address(destination, destination_port)


def _address(raw: bytes, port: int) -> Address:
    return Address(unmapped(ipaddress.IPv6Address(raw)), port)


class Client(NamedTuple):
    """What user space knows of the client's leg: packets' tuple (on lo), MSS, window and its scale, as the client said."""

    cookie: int
    packets: bytes
    mss: int
    window: int
    scale: int


def pack_flow(client: Client, asked: Asked, worker: int) -> bytes:
    """A new struct flow."""
    addresses = (client.packets, bytes(TUPLE_SIZE))
    limits = (0, 0, client.mss, client.window)
    return FLOW.pack(client.cookie, 0, 0, 0, *addresses, *(0,) * 8, *limits, client.scale, 0, 0, asked, *(0,) * 4, worker)


def unpack_flow(raw: bytes) -> FlowEntry:
    """A struct flow that came back."""
    cookie, _syn, armed, ended, client, server, isn, _clock, _mark, ifindex, *_rest = FLOW.unpack(raw)
    state, reason, ends = State(raw[FLOW_STATE_AT]), raw[FLOW_REASON_AT], Ends(raw[FLOW_ENDS_AT])
    return FlowEntry(client, server, isn, ifindex, state, reason, ends, armed, ended, cookie, raw[FLOW_WORKER_AT])


def unpack_path(raw: bytes) -> PathEntry:
    """A struct path."""
    flow, seen, sent, _to, _base, acked, _seq, _ack, _clock_d, _echo_d, _clock, _mark, ifindex, *_ = PATH.unpack(raw)
    return PathEntry(flow, seen, sent, ifindex, acked)


def unpack_event(raw: bytes) -> Event:
    """A struct event."""
    return Event(*EVENT.unpack(raw))
