"""The programs translate a packet as RFC 9293 numbers demand, whatever its options look like, and its checksums hold."""

from __future__ import annotations

import ipaddress
import itertools
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


def pack_tuple(source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """struct tuple of packets from `source` to `destination`."""
    ips = [
        ipaddress.IPv6Address(ip).packed if ":" in ip else layout.MAPPED + socket.inet_aton(ip)
        for ip, _ in (source, destination)
    ]
    return layout.TUPLE.pack(*ips, source[1], destination[1])


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
            key, to = pack_tuple(source, destination), pack_tuple(new_source, new_destination)
            deltas = (SEQ_DELTA, ACK_DELTA, CLOCK_DELTA, ECHO_DELTA)
            # flow, seen, bytes, to, base, acked, deltas, clock, mark, ifindex, scales 7 -> 3, UP, ACTIVE, timestamps, from lo
            made.maps["paths"].update(key, layout.PATH.pack(1, 0, 0, 0, to, BASE, 0, *deltas, 0, 0, 1, 7, 3, 0, 1, 1, 0, 1))
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


PLAIN = Segment(1, 2, 0x18, 3, b"", bytes(range(200)))
MOVED = replace(PLAIN, seq=1 + SEQ_DELTA, ack=2 + ACK_DELTA, window=3 << 7 >> 3)
IP_OPTIONS = {"nops": NOP * 4, "record_route": b"\x07\x27\x04" + bytes(36) + b"\0"}
PADDING = b"\x01\x04" + bytes(4)
# Header kinds in the order they come, RFC 8200 4.1: hop by hop, routing (type 4, no segment left), destination.
EXTENSIONS = {"hop": (0,), "destination": (60,), "three": (0, 43, 60)}


def with_ip_header(frame: bytes, first: int, options: bytes, fragment: int, payload: bytes) -> bytes:
    """An IPv4 frame with another beginning of its header, other options, flags and offset, and payload; checksum right."""
    size = 20 + len(options) + len(payload)
    head = bytes([first]) + frame[15:16] + struct.pack("!H", size) + frame[18:20] + struct.pack("!H", fragment) + frame[22:24]
    head += b"\0\0" + frame[26:34] + options
    return frame[:14] + head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def with_extensions(frame: bytes, kinds: tuple[int, ...]) -> bytes:
    """An IPv6 frame with extension headers."""
    headers = b"".join(
        bytes([following, 0]) + (b"\x04" + bytes(5) if kind == 43 else PADDING)
        for kind, following in zip(kinds, (*kinds[1:], 6), strict=True)
    )
    size = struct.unpack_from("!H", frame, 18)[0] + len(headers)
    return frame[:18] + struct.pack("!HB", size, kinds[0]) + frame[21:54] + headers + frame[54:]


@pytest.mark.parametrize("name", list(IP_OPTIONS))
def test_ip_options_are_left_behind(attached: Attached, name: str) -> None:
    source, destination, new_source, new_destination = ADDRESSES["v4"]
    frame = packed("v4", source, destination, PLAIN)
    options = IP_OPTIONS[name]
    verdict, got = run(attached, with_ip_header(frame, 0x45 + len(options) // 4, options, 0x4000, frame[34:]))
    assert (verdict, got) == (REDIRECTED, packed("v4", new_source, new_destination, MOVED))


@pytest.mark.parametrize("name", list(EXTENSIONS))
def test_extension_headers_are_left_behind(attached: Attached, name: str) -> None:
    source, destination, new_source, new_destination = ADDRESSES["v6"]
    verdict, got = run(attached, with_extensions(packed("v6", source, destination, PLAIN), EXTENSIONS[name]))
    assert (verdict, got) == (REDIRECTED, packed("v6", new_source, new_destination, MOVED))


MORE = 0x2000


def fragments(frame: bytes, *cuts: int) -> list[bytes]:
    """An IPv4 frame in pieces; `cuts` are where, in the IP payload, multiples of 8."""
    payload, bounds = frame[34:], (0, *cuts, len(frame) - 34)
    return [
        with_ip_header(frame, 0x45, b"", (MORE if to < len(payload) else 0) | at // 8, payload[at:to])
        for at, to in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("options", ["none", "usual", "usual_sack", "odd_sack"])
def test_fragments_are_those_of_the_translated_segment(attached: Attached, options: str) -> None:
    source, destination, new_source, new_destination = ADDRESSES["v4"]
    given_segment = replace(PLAIN, options=LAYOUTS[options](timestamps(5, 6), sack(7, 8, 9, 10)))
    shift = [(7 + ACK_DELTA) % TWO_32, (8 + ACK_DELTA) % TWO_32, (9 + ACK_DELTA) % TWO_32, (10 + ACK_DELTA) % TWO_32]
    clocks = timestamps(5 + CLOCK_DELTA, (6 + ECHO_DELTA) % TWO_32)
    wanted = replace(MOVED, options=LAYOUTS[options](clocks, sack(*shift)))
    for given_piece, wanted_piece in zip(
        fragments(packed("v4", source, destination, given_segment), 72, 144),
        fragments(packed("v4", new_source, new_destination, wanted), 72, 144),
        strict=True,
    ):
        verdict, got = run(attached, given_piece)
        assert verdict == REDIRECTED
        assert same_but_for_zero_sum(got, wanted_piece, 50)


def test_the_last_fragment_tells_how_long_a_segment_was(attached: Attached) -> None:
    source, destination, *_ = ADDRESSES["v4"]
    flow = layout.COOKIE.pack(1)
    client = layout.Client(0, 0, 0, 0)
    attached.maps["flows"].update(flow, layout.pack_flow(client, layout.Asked.HELD, 0))
    key = pack_tuple(source, destination)
    path = bytearray(attached.maps["paths"].lookup(key) or b"")
    path[16:24] = bytes(8)  # as if nothing had been sent
    attached.maps["paths"].update(key, bytes(path))
    first, last = fragments(packed("v4", source, destination, replace(PLAIN, seq=BASE, flags=0x11)), 80)
    run(attached, first)
    assert sent(attached, key) == 60
    assert layout.unpack_flow(attached.maps["flows"].lookup(flow) or b"").ends == 0
    run(attached, last)
    assert sent(attached, key) == 201  # a FIN counts as one
    assert layout.unpack_flow(attached.maps["flows"].lookup(flow) or b"").ends == layout.Ends.UP_FIN


def sent(attached: Attached, key: bytes) -> int:
    return layout.unpack_path(attached.maps["paths"].lookup(key) or b"").sent


def test_a_fragment_before_its_first_passes_untouched(attached: Attached) -> None:
    source, destination, *_ = ADDRESSES["v4"]
    frame = packed("v4", source, destination, PLAIN)
    early = fragments(frame[:18] + b"\x77\x77" + frame[20:], 80)[1]
    assert run(attached, early) == (UNTOUCHED, early)


def test_fragments_with_options_and_those_of_ipv6_pass_untouched(attached: Attached) -> None:
    source, destination, *_ = ADDRESSES["v4"]
    frame = packed("v4", source, destination, PLAIN)
    odd = with_ip_header(frame, 0x46, NOP * 4, MORE, frame[34:])
    assert run(attached, odd) == (UNTOUCHED, odd)
    source, destination, *_ = ADDRESSES["v6"]
    frame = packed("v6", source, destination, PLAIN)
    whole = frame[:18] + struct.pack("!HB", len(frame) - 46, 44) + frame[21:54] + bytes([6, 0, 0, 0]) + bytes(4) + frame[54:]
    assert run(attached, whole) == (UNTOUCHED, whole)


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
