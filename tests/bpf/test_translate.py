"""The programs translate a packet as RFC 9293 numbers demand, whatever its options look like, and its checksums hold."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.bpf import programs
from interceptor.netns import entered
from interceptor.proxy.relay import packet_layout as layout
from interceptor.proxy.relay.packet_attach import Attached, attach
from tests.rig.net import pods

REDIRECTED, UNTOUCHED = 7, 0xFFFFFFFF  # TC_ACT_REDIRECT, TC_ACT_UNSPEC, linux/pkt_cls.h
TWO_32 = 1 << 32
ADDRESSES = {
    "v4": (("10.1.1.1", 4000), ("127.0.0.1", 15001), ("10.1.1.1", 5000), ("10.9.9.9", 80)),
    "v6": (("fd00::1", 4000), ("::1", 15001), ("fd00::1", 5000), ("fd00:9::9", 80)),
}
SEQ_DELTA, ACK_DELTA, CLOCK_DELTA, ECHO_DELTA = 0x9000_0001, 0x7123_4567, 77_000, 0xFFFF_0000
BASE = 1000


@dataclass(frozen=True)
class Segment:
    """A TCP segment, taken apart."""

    seq: int
    ack: int
    flags: int
    window: int
    options: bytes
    payload: bytes


def checksum(content: bytes) -> int:
    """RFC 1071; 0 over content with a right checksum in it."""
    total = sum(struct.unpack(f"!{(len(content) + 1) // 2}H", content + bytes(len(content) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(family: str, source: tuple[str, int], destination: tuple[str, int], segment: Segment) -> bytes:
    """An Ethernet frame."""
    kind = socket.AF_INET if family == "v4" else socket.AF_INET6
    ends = socket.inet_pton(kind, source[0]) + socket.inet_pton(kind, destination[0])
    head = 20 + len(segment.options)
    fixed = (source[1], destination[1], segment.seq, segment.ack, head // 4 << 4, segment.flags, segment.window)
    size = head + len(segment.payload)
    pseudo = ends + struct.pack("!HH" if family == "v4" else "!IxxxB", *((6, size) if family == "v4" else (size, 6)))
    tcp = struct.pack("!HHIIBBHHH", *fixed, 0, 0) + segment.options + segment.payload
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    if family == "v6":
        return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, size, 6, 64) + ends + tcp
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 1, 0x4000, 64, 6, 0) + ends
    return bytes(12) + b"\x08\x00" + ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + tcp


def timestamps(clock: int, echo: int) -> bytes:
    return struct.pack("!BBII", 8, 10, clock, echo)


def sack(*edges: int) -> bytes:
    return struct.pack(f"!BB{len(edges)}I", 5, 2 + 4 * len(edges), *edges)


@pytest.fixture(scope="module")
def attached() -> Iterator[Attached]:
    """The programs, in a namespace of their own, with a path for each family."""
    with pods(1) as (pod,), entered(pod.path):
        made = attach()
        for source, destination, new_source, new_destination in ADDRESSES.values():
            key, to = layout.pack_tuple(source, destination), layout.pack_tuple(new_source, new_destination)
            deltas = (SEQ_DELTA, ACK_DELTA, CLOCK_DELTA, ECHO_DELTA)
            # flow, seen, bytes, to, base, acked, deltas, clock, mark, ifindex, scales 7 -> 3, UP, ACTIVE, timestamps, from lo
            made.maps["paths"].update(key, layout.PATH.pack(1, 0, 0, to, BASE, 0, *deltas, 0, 0, 1, 7, 3, 0, 1, 1, 0, 1))
        yield made
        made.close()


NOP = b"\x01"
LAYOUTS = {
    "none": lambda _ts, _sack: b"",
    "usual": lambda ts, _sack: NOP * 2 + ts,
    "usual_sack": lambda ts, sack: NOP * 2 + ts + NOP * 2 + sack,
    "sack_alone": lambda _ts, sack: NOP * 2 + sack,
    "timestamps_first": lambda ts, _sack: ts + NOP * 2,
    "odd": lambda ts, _sack: NOP + ts + NOP,
    "sack_first": lambda ts, sack: NOP * 2 + sack + NOP * 2 + ts,
    "odd_sack": lambda ts, sack: NOP + sack + NOP * 3 + ts,
    "unknown": lambda ts, _sack: b"\xfe\x04\xab\xcd" + ts + b"\x00\x00",
}
NUMBER = st.integers(0, TWO_32 - 1)


@pytest.mark.parametrize("family", list(ADDRESSES))
@pytest.mark.parametrize("name", list(LAYOUTS))
@given(numbers=st.lists(NUMBER, min_size=8, max_size=8), window=st.integers(0, 0xFFFF), payload=st.binary(max_size=64))
def test_a_segment_is_translated_and_its_checksums_hold(
    attached: Attached, family: str, name: str, numbers: list[int], window: int, payload: bytes
) -> None:
    seq, ack, clock, echo, *edges = numbers
    make = LAYOUTS[name]
    given_segment = Segment(seq, ack, 0x10, window, make(timestamps(clock, echo), sack(*edges)), payload)
    assert len(given_segment.options) % 4 == 0
    up = lambda number, delta: (number + delta) % TWO_32  # noqa: E731
    wanted = replace(
        given_segment,
        seq=up(seq, SEQ_DELTA),
        ack=up(ack, ACK_DELTA),
        window=min(0xFFFF, window << 7 >> 3),
        options=make(timestamps(up(clock, CLOCK_DELTA), up(echo, ECHO_DELTA)), sack(*(up(edge, ACK_DELTA) for edge in edges))),
    )
    source, destination, new_source, new_destination = ADDRESSES[family]
    verdict, got = run(attached, packed(family, source, destination, given_segment))
    assert verdict == REDIRECTED
    assert same_but_for_zero_sum(got, packed(family, new_source, new_destination, wanted), 50 if family == "v4" else 70)


def run(attached: Attached, frame: bytes) -> tuple[int, bytes]:
    """Summed by nobody, and by the device, whose sum (CHECKSUM_COMPLETE) must be that of what comes out."""
    program = attached.loaded.programs["loopback"]
    plain = programs.test_run(program, frame)
    assert programs.test_run(program, frame, programs.TEST_CHECKSUM_COMPLETE) == plain
    return plain


def same_but_for_zero_sum(got: bytes, wanted: bytes, at: int) -> bool:
    """Equal; 0x0000 and 0xffff are the same sum (RFC 1624 3)."""
    plain = lambda frame: frame[:at] + frame[at : at + 2].replace(b"\xff\xff", b"\0\0") + frame[at + 2 :]  # noqa: E731
    return plain(got) == plain(wanted)


@pytest.mark.parametrize("family", list(ADDRESSES))
def test_what_is_not_of_a_flow_passes_untouched(attached: Attached, family: str) -> None:
    source, destination, *_ = ADDRESSES[family]
    frame = packed(family, (source[0], source[1] + 1), destination, Segment(1, 2, 0x10, 3, b"", b"hello"))
    verdict, got = run(attached, frame)
    assert (verdict, got) == (UNTOUCHED, frame)


@pytest.mark.parametrize("what", ["fragment", "ip_options"])
def test_what_cannot_be_translated_passes_untouched(attached: Attached, what: str) -> None:
    source, destination, *_ = ADDRESSES["v4"]
    frame = packed("v4", source, destination, Segment(1, 2, 0x10, 3, b"", b"hello"))
    if what == "fragment":
        frame = frame[:20] + b"\x20\x00" + frame[22:]
    else:
        frame = frame[:14] + b"\x46" + frame[15:34] + NOP * 4 + frame[34:]
    verdict, got = run(attached, frame)
    assert (verdict, got) == (UNTOUCHED, frame)


ROUTERS = {"v4": "10.7.7.7", "v6": "fd00:7::7"}


def quoting(family: str, receiver: str, quoted: bytes) -> bytes:
    """An Ethernet frame: a router tells `receiver` that a frame of its own, `quoted`, was too big."""
    kind = socket.AF_INET if family == "v4" else socket.AF_INET6
    ends = socket.inet_pton(kind, ROUTERS[family]) + socket.inet_pton(kind, receiver)
    icmp = struct.pack("!BBHI", *((3, 4) if family == "v4" else (2, 0)), 0, 1300) + quoted[14:]
    pseudo = b"" if family == "v4" else ends + struct.pack("!IxxxB", len(icmp), 58)
    icmp = icmp[:2] + struct.pack("!H", checksum(pseudo + icmp)) + icmp[4:]
    if family == "v6":
        return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(icmp), 58, 64) + ends + icmp
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(icmp), 1, 0x4000, 64, 1, 0) + ends
    return bytes(12) + b"\x08\x00" + ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + icmp


@pytest.mark.parametrize("family", list(ADDRESSES))
@given(seq=NUMBER, payload=st.binary(max_size=32))
def test_an_error_is_translated_and_its_checksums_hold(attached: Attached, family: str, seq: int, payload: bytes) -> None:
    source, destination, new_source, new_destination = ADDRESSES[family]
    segment = Segment(seq, 5, 0x10, 6, b"", payload)
    verdict, got = run(attached, quoting(family, destination[0], packed(family, destination, source, segment)))
    assert verdict == REDIRECTED
    # The quoted TCP checksum is nobody's to check, and stays.
    was = packed(family, destination, source, segment)
    told = packed(family, new_destination, new_source, replace(segment, seq=(seq + ACK_DELTA) % TWO_32))
    at = len(told) - len(payload) - 4
    told = told[:at] + was[at : at + 2] + told[at + 2 :]
    assert same_but_for_zero_sum(got, quoting(family, new_destination[0], told), 36 if family == "v4" else 56)
