"""Find one's way in a DNS message (RFC 1035 4.1): its question, its records' bounds, its TTLs. Opens nothing, keeps nothing.

Bytes that are passed on stay as they came: whoever signed or compressed them knows why. So there is no message object, only
offsets. Reads hostile bytes: Malformed is all that it ever raises. Why by hand: docs/decisions/0010.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

HEADER_SIZE = 12
LIMIT = 65535  # the length before a message over TCP has two bytes (RFC 1035 4.2.2)
# What a client without EDNS takes over UDP (RFC 1035 4.2.1), and the least that one with EDNS may say (RFC 6891 6.2.3).
SMALLEST_LIMIT = 512
# What we say we take: no fragments on any path (DNS flag day 2020).
OWN_LIMIT = 1232
NAME_LIMIT = 255  # RFC 1035 2.3.4
# Enough for the answers there are; a message of 64 KiB could have 5,900 records, each a few microseconds.
RECORDS_LIMIT = 2048

# Header flags (RFC 1035 4.1.1, RFC 4035 3.1.6 and 3.2.2).
QR, OPCODE, AA, TC, RD, RA, AD, CD, RCODE = 0x8000, 0x7800, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010, 0x000F
DO = 0x8000  # in the TTL field of OPT (RFC 6891 6.1.4)
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)
BADVERS = 16
RCODES = (
    "NOERROR",
    "FORMERR",
    "SERVFAIL",
    "NXDOMAIN",
    "NOTIMP",
    "REFUSED",
    "YXDOMAIN",
    "YXRRSET",
    "NXRRSET",
    "NOTAUTH",
    "NOTZONE",
)

A, NS, CNAME, SOA, AAAA, OPT, IXFR, AXFR, ANY = 1, 2, 5, 6, 28, 41, 251, 252, 255
SIG, TSIG = 24, 250  # a signature over the whole message (RFC 2931, RFC 8945)
_TYPES = "A:1 NS:2 CNAME:5 SOA:6 PTR:12 MX:15 TXT:16 AAAA:28 SRV:33 NAPTR:35 DNAME:39 DS:43 RRSIG:46 NSEC:47 DNSKEY:48 NSEC3:50"
_MORE = "TLSA:52 SVCB:64 HTTPS:65 IXFR:251 AXFR:252 ANY:255 CAA:257"
TYPES = {int(number): name for name, _, number in (each.partition(":") for each in f"{_TYPES} {_MORE}".split())}
# EDNS options that are between neighbours and change no answer: NSID, COOKIE, keepalive, padding (RFC 5001, 7873, 7828, 7830).
HOP_BY_HOP = frozenset({3, 10, 11, 12})
IN = 1

_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length of the data (RFC 1035 3.2.1)
_U16 = struct.Struct("!H")
_U32 = struct.Struct("!I")


class Malformed(Exception):
    """Not a DNS message, or one that contradicts itself."""


class Key(NamedTuple):
    """What an answer depends on. `flags`: RD, AD and CD of the header; with DO, those that ask for something else."""

    name: bytes  # as on the wire, in lower case
    kind: int
    class_: int
    flags: int
    dnssec_ok: bool


# Not frozen, here and below: that would cost 2 µs each, and these are made for every question.
@dataclass(slots=True)
class Query:
    """A question. `limit`: bytes of an answer that the asker takes over UDP. `edns`: whether it knows EDNS at all.

    `is_plain`: the answer depends on `key` alone. Others (signed, for a subnet, not of opcode QUERY) are passed on as they are.
    """

    wire: bytes
    key: Key
    question_end: int
    limit: int
    edns: bool
    is_plain: bool

    @property
    def name(self) -> str:
        """The name as text."""
        return name_text(self.wire[HEADER_SIZE : self.question_end - _QUESTION.size])


class Record(NamedTuple):
    """One record's place: its data are `wire[data:end]`, its TTL stands 6 bytes before them, its name begins at `start`."""

    start: int
    kind: int
    ttl: int
    data: int
    end: int


@dataclass(slots=True)
class Answer:
    """A response and what is in it. `answers`: how many of `records` are in the answer section."""

    wire: bytes
    question_end: int
    rcode: int
    answers: int
    authorities: int
    records: tuple[Record, ...]  # without OPT
    opt: Record | None

    @property
    def is_truncated(self) -> bool:
        """Whether there is more of it over TCP."""
        return bool(self.wire[2] << 8 & TC)


def parse_query(wire: bytes) -> Query:
    """What is asked. Raises Malformed when it is not exactly one question, in a message that ends where it says."""
    if len(wire) < HEADER_SIZE:
        raise Malformed(f"{len(wire)} bytes")
    _, flags, questions, answers, authorities, additional = _HEADER.unpack_from(wire)
    if flags & QR:
        raise Malformed("a response")
    if questions != 1:
        raise Malformed(f"{questions} questions")
    end = _question_end(wire)
    kind, class_ = _QUESTION.unpack_from(wire, end - _QUESTION.size)
    opt, is_plain = None, not flags & OPCODE and not answers and not authorities
    if answers or authorities or additional or len(wire) != end:
        records, stop = _records(wire, end, answers + authorities + additional)
        if stop != len(wire):
            raise Malformed(f"{len(wire) - stop} bytes behind the message")
        opt = _only_opt(records)
        is_plain = is_plain and len(records) == (opt is not None) and (opt is None or _is_hop_by_hop(wire, opt))
    limit = SMALLEST_LIMIT if opt is None else max(SMALLEST_LIMIT, _U16.unpack_from(wire, opt.data - 8)[0])
    key = Key(
        wire[HEADER_SIZE : end - _QUESTION.size].lower(), kind, class_, flags & (RD | AD | CD), bool(opt and opt.ttl & DO)
    )
    return Query(wire, key, end, limit, opt is not None, is_plain)


def parse_answer(wire: bytes, query: Query) -> Answer:
    """A response to `query`, whatever its id. Raises Malformed when it is none."""
    if len(wire) < HEADER_SIZE:
        raise Malformed(f"{len(wire)} bytes")
    _, flags, questions, answers, authorities, additional = _HEADER.unpack_from(wire)
    if not flags & QR or (flags ^ query.wire[2] << 8) & OPCODE:
        raise Malformed("no response")
    end = query.question_end
    # A server that makes nothing of the message may leave the question out, and one that was told to change its zone
    # (RFC 2136 3.8).
    if questions == 0 and (flags & OPCODE or flags & RCODE not in (NOERROR, NXDOMAIN)):
        end = HEADER_SIZE
    elif questions != 1 or not _same_question(wire, query.wire, end):
        raise Malformed("another question")
    total = answers + authorities + additional
    # An answer cut anywhere is still a truncated answer: some servers cut between bytes (RFC 2181 9).
    if flags & TC:
        return Answer(wire, end, flags & RCODE, 0, 0, (), None)
    records, _ = _records(wire, end, total)
    opt = _only_opt(records)
    rcode = flags & RCODE | (opt.ttl >> 24 << 4 if opt else 0)
    return Answer(wire, end, rcode, answers, authorities, tuple(each for each in records if each is not opt), opt)


def with_id(wire: bytes, from_wire: bytes) -> bytes:
    """`wire` with the message id of `from_wire`."""
    return from_wire[:2] + wire[2:]


def error(query: bytes, rcode: int) -> bytes:
    """An answer to `query` (12 bytes at least, perhaps malformed) with nothing in it but `rcode`, not even the question."""
    flags = QR | (query[2] << 8 | query[3]) & (OPCODE | RD | CD) | RA | rcode & RCODE
    return query[:2] + _HEADER.pack(0, flags, 0, 0, 0, 0)[2:]


def failure(query: Query, rcode: int) -> bytes:
    """An answer to `query` with its question and `rcode`."""
    flags = QR | (query.wire[2] << 8 | query.wire[3]) & (OPCODE | RD | CD) | RA | rcode & RCODE
    head = query.wire[:2] + _HEADER.pack(0, flags, 1, 0, 0, int(query.edns))[2:]
    return head + query.wire[HEADER_SIZE : query.question_end] + own_opt(query, rcode)


def cut(response: bytes, query: Query) -> bytes:
    """`response` without its records and with TC, for an asker over UDP that would not take it all (RFC 2181 9)."""
    flags = response[2] << 8 | response[3] | TC
    head = response[:2] + _HEADER.pack(0, flags, 1, 0, 0, int(query.edns))[2:]
    return head + query.wire[HEADER_SIZE : query.question_end] + own_opt(query, flags & RCODE)


def own_opt(query: Query, rcode: int) -> bytes:
    """An OPT record of ours, without options, for an asker that knows EDNS; nothing for one that does not (RFC 6891 7)."""
    if not query.edns:
        return b""
    return b"\0" + _RECORD.pack(OPT, OWN_LIMIT, rcode >> 4 << 24 | (DO if query.key.dnssec_ok else 0), 0)


def with_own_opt(wire: bytes, query: Query, rcode: int) -> bytes:
    """`wire`, which has no OPT, with ours."""
    opt = own_opt(query, rcode)
    if not opt:
        return wire
    (additional,) = _U16.unpack_from(wire, 10)
    return wire[:10] + _U16.pack(additional + 1) + wire[HEADER_SIZE:] + opt


def without_opt(answer: Answer) -> bytes | None:
    """`answer` as bytes without its OPT; None when that would break it, since something follows."""
    if answer.opt is None:
        return answer.wire
    if answer.opt.end != len(answer.wire):
        return None
    (additional,) = _U16.unpack_from(answer.wire, 10)
    return answer.wire[:10] + _U16.pack(additional - 1) + answer.wire[HEADER_SIZE : answer.opt.start]


def with_ttls(wire: bytes, records: tuple[Record, ...], age: int) -> bytearray:
    """A copy of `wire` with each record's TTL less by `age` seconds, not below 0."""
    copy = bytearray(wire)
    for record in records:
        _U32.pack_into(copy, record.data - 6, max(0, record.ttl - age))
    return copy


def lifetime_s(answer: Answer, query: Query) -> int:
    """How long `answer` may be kept: 0 when it must not be.

    The lowest TTL in it; for one that says "there is none", no longer than its SOA's minimum says, and never without one
    (RFC 2308 5). A CNAME alone does not answer a question for another type (RFC 2308 2.2).
    """
    if answer.rcode not in (NOERROR, NXDOMAIN) or answer.is_truncated or not answer.records:
        return 0
    if any(record.kind in (SIG, TSIG) for record in answer.records):
        return 0
    lowest = min(record.ttl for record in answer.records)
    kind = query.key.kind
    if answer.rcode == NOERROR and any(kind in (record.kind, ANY) for record in answer.records[: answer.answers]):
        return lowest
    for record in answer.records[answer.answers : answer.answers + answer.authorities]:
        if record.kind == SOA and record.end - record.data >= 4:
            return min(lowest, int(_U32.unpack_from(answer.wire, record.end - 4)[0]))
    return 0


def as_no_data(answer: Answer) -> Answer:
    """`answer`, which says that there is no such name, saying that the name has no such records (RFC 2308 2.2)."""
    return replace(answer, wire=answer.wire[:3] + bytes((answer.wire[3] & ~RCODE,)) + answer.wire[4:], rcode=NOERROR)


def addresses(answer: Answer) -> list[tuple[bytes, int]]:
    """The addresses in the answer section, packed, each with its TTL."""
    sizes = {A: 4, AAAA: 16}
    return [
        (answer.wire[record.data : record.end], record.ttl)
        for record in answer.records[: answer.answers]
        if sizes.get(record.kind) == record.end - record.data
    ]


@lru_cache(1024)
def name_text(name: bytes) -> str:
    """An uncompressed name as people write it, without the last dot; other than printable ASCII as \\DDD (RFC 4343 2.1)."""
    labels, at = [], 0
    while size := name[at]:
        label = name[at + 1 : at + 1 + size]
        text = label.decode("latin-1")
        labels.append(text if text.replace("-", "").replace("_", "").isalnum() and text.isascii() else _escaped(label))
        at += size + 1
    return ".".join(labels) or "."


def type_text(kind: int) -> str:
    """AAAA for 28; TYPE4711 for one without a name here (RFC 3597 5)."""
    return TYPES.get(kind) or f"TYPE{kind}"


def rcode_text(rcode: int) -> str:
    """NXDOMAIN for 3."""
    if rcode == BADVERS:
        return "BADVERS"
    return RCODES[rcode] if rcode < len(RCODES) else f"RCODE{rcode}"


def _escaped(label: bytes) -> str:
    return "".join(
        f"\\{byte:03d}" if not 0x21 <= byte <= 0x7E else f"\\{byte:c}" if byte in b'."\\();@$' else chr(byte) for byte in label
    )


def _question_end(wire: bytes) -> int:
    end = _name_end(wire, HEADER_SIZE)
    # Nothing stands before the question that its name could point to.
    if wire[end - 1]:
        raise Malformed("a compressed name in the question")
    end += _QUESTION.size
    if end > len(wire):
        raise Malformed("the question is cut")
    return end


def _same_question(one: bytes, other: bytes, end: int) -> bool:
    # Names are the same in any case (RFC 4343); types and classes are numbers.
    numbers = end - _QUESTION.size
    return one[numbers:end] == other[numbers:end] and one[HEADER_SIZE:numbers].lower() == other[HEADER_SIZE:numbers].lower()


def _name_end(wire: bytes, at: int) -> int:
    # Behind the root label, or behind a pointer; where that points to does not matter here (RFC 1035 4.1.4).
    start = at
    try:
        while size := wire[at]:
            if size >= 0xC0:
                wire[at + 1]  # it is there
                return at + 2
            if size > 63:
                raise Malformed(f"a label of type {size >> 6:#04b}")
            at += size + 1
    except IndexError:
        raise Malformed("a name is cut") from None
    if at + 1 - start > NAME_LIMIT:
        raise Malformed(f"a name of {at + 1 - start} bytes")
    return at + 1


def _records(wire: bytes, at: int, count: int) -> tuple[list[Record], int]:
    if count > RECORDS_LIMIT:
        raise Malformed(f"{count} records")
    records = []
    size, unpack = len(wire), _RECORD.unpack_from
    for _ in range(count):
        start = at
        # Most names are one pointer: worth not calling for.
        at = at + 2 if at < size and wire[at] >= 0xC0 else _name_end(wire, at)
        if at + _RECORD.size > size:
            raise Malformed("a record is cut")
        kind, _class, ttl, length = unpack(wire, at)
        at += _RECORD.size
        # A TTL with its first bit set is 0 (RFC 2181 8), which in OPT means something else (RFC 6891 6.1.3).
        records.append(Record(start, kind, ttl if ttl < 1 << 31 or kind == OPT else 0, at, at + length))
        at += length
        if at > size:
            raise Malformed("a record's data are cut")
    return records, at


def _only_opt(records: list[Record]) -> Record | None:
    found = [record for record in records if record.kind == OPT]
    if len(found) > 1 or (found and found[0].data - found[0].start != 1 + _RECORD.size):
        raise Malformed("more than one OPT, or one with a name")
    return found[0] if found else None


def _is_hop_by_hop(wire: bytes, opt: Record) -> bool:
    # An option is a code, a length and that many bytes (RFC 6891 6.1.2).
    at = opt.data
    while at < opt.end:
        if at + 4 > opt.end:
            raise Malformed("an EDNS option is cut")
        code, length = _QUESTION.unpack_from(wire, at)
        at += 4 + length
        if at > opt.end:
            raise Malformed("an EDNS option is cut")
        if code not in HOP_BY_HOP:
            return False
    # Version 0 is all there is: a server says BADVERS to others.
    return not opt.ttl >> 16 & 0xFF
