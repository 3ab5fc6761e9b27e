"""What a DNS message says, and messages of our own. dnspython reads and writes them (docs/decisions/0012). Opens nothing.

Whoever signed or compressed a message knows why, so one that is passed on stays as it came: of its bytes, only those of the
header have places that we know (RFC 1035 4.1.1), and only id and flags are changed. Reads hostile bytes: Malformed is all
that is ever raised.

Importing this costs 60 ms and 5 MB, so only a proxy that answers DNS does (server.py); and all that the library would import
later is imported here, while the proxy's user still may.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.SOA
import dns.rrset
import dns.update  # for when it reads an UPDATE
from dns.edns import OptionType
from dns.rdataclass import IN
from dns.rdatatype import AAAA, ANY, AXFR, IXFR, SIG, SOA, A

NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP = range(5)  # RFC 1035 4.1.1
# Answers: with other rcodes, another resolver may know better. 6 to 10 are of UPDATE (RFC 2136 2.2).
FINAL = frozenset({NOERROR, NXDOMAIN, 6, 7, 8, 9, 10})
INTERNET: int = IN
ADDRESSES: dict[int, int] = {A: AF_INET, AAAA: AF_INET6}
OTHER_FAMILY: dict[int, int] = {A: AAAA, AAAA: A}
TRANSFERS: frozenset[int] = frozenset({AXFR, IXFR})

HEADER = struct.Struct("!HHHHHH")
# As numbers: to combine the library's enumerations costs 2 µs each time.
QR, TC, RD, RA, AD, CD, DO = map(
    int, (dns.flags.QR, dns.flags.TC, dns.flags.RD, dns.flags.RA, dns.flags.AD, dns.flags.CD, dns.flags.DO)
)
OPCODE, RCODE = 0x7800, 0x000F
# What a client without EDNS takes over UDP (RFC 1035 4.2.1), and the least that one with EDNS may say (RFC 6891 6.2.3).
SMALLEST_LIMIT = 512
# What we say we take: no fragments on any path (DNS flag day 2020).
OWN_LIMIT = 1232
# Longer messages are rare, and are passed on with no more than their question read: what a record costs to read is known
# (15 µs), so what a message can cost is.
LARGEST = 4096
# EDNS options that are between neighbours and change no answer (RFC 5001, 7873, 7828, 7830).
HOP_BY_HOP = frozenset({OptionType.NSID, OptionType.COOKIE, OptionType.KEEPALIVE, OptionType.PADDING})

dns.rdata.load_all_types()  # type: ignore[no-untyped-call]


class Malformed(Exception):
    """Not a DNS message, or one that contradicts itself."""


class Key(NamedTuple):
    """What an answer depends on. `flags`: RD, AD and CD of the header; with DO, those that ask for something else."""

    name: tuple[bytes, ...]  # labels in lower case
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
    name: str  # in lower case
    limit: int
    edns: bool
    is_plain: bool
    message: dns.message.Message


@dataclass(slots=True)
class Answer:
    """A response. `answers`: how many records its answer section has.

    `message` is None when no more than its question was read: it is cut, or long, or has a record that the library can't read.
    """

    wire: bytes
    rcode: int
    answers: int
    message: dns.message.Message | None

    @property
    def is_truncated(self) -> bool:
        """Whether there is more of it over TCP."""
        return bool(self.wire[2] << 8 & TC)


def read_query(wire: bytes) -> Query:
    """What is asked. Raises Malformed when it is not exactly one question, in a message that ends where it says."""
    flags, questions, answers, authorities, additional = _header(wire)
    if flags & QR:
        raise Malformed("a response")
    if questions != 1:
        raise Malformed(f"{questions} questions")
    # OPT and a signature at most; with more it is none that we could answer, and what is in it is the server's business.
    is_usual = not flags & OPCODE and not answers and not authorities and additional <= 2 and len(wire) <= LARGEST
    message = _read(wire, question_only=not is_usual)
    [question] = message.question
    edns = message.edns >= 0
    key = Key(
        tuple(label.lower() for label in question.name.labels),
        question.rdtype,
        question.rdclass,
        flags & (RD | AD | CD),
        edns and bool(message.ednsflags & DO),
    )
    is_plain = is_usual and not message.additional and not message.had_tsig and _changes_no_answer(message)
    limit = max(SMALLEST_LIMIT, message.payload) if edns else SMALLEST_LIMIT
    return Query(wire, key, question.name.to_text(omit_final_dot=True).lower(), limit, edns, is_plain, message)


def read_answer(wire: bytes, query: Query) -> Answer:
    """A response to `query`, whatever its id. Raises Malformed when it is none."""
    flags, questions, answers, _, _ = _header(wire)
    if questions > 1:
        raise Malformed(f"{questions} questions")
    # An answer cut anywhere is still a truncated answer: some servers cut between bytes (RFC 2181 9).
    whole = None if flags & TC or len(wire) > LARGEST else _read_whole(wire)
    message = whole or _read(wire, question_only=True)
    message.id = query.message.id
    # With an error, the question may be left out; and by a server that was told to change its zone (RFC 2136 3.8).
    if not query.message.is_response(message):
        raise Malformed("another question")
    return Answer(wire, message.rcode(), 0 if flags & TC else answers, whole)


def with_id(wire: bytes, from_wire: bytes) -> bytes:
    """`wire` with the message id of `from_wire`."""
    return from_wire[:2] + wire[2:]


def is_query(wire: bytes) -> bool:
    """Whether it may be one, however malformed: answering an answer would begin a conversation without end."""
    return len(wire) >= HEADER.size and not wire[2] << 8 & QR


def error(wire: bytes, rcode: int) -> bytes:
    """An answer to the perhaps malformed query `wire` with nothing in it but `rcode`, not even the question."""
    made = dns.message.Message(id=int.from_bytes(wire[:2]))
    made.flags = dns.flags.Flag(_flags_of_failure(wire) | rcode)
    return made.to_wire()


def failure(query: Query, rcode: int) -> bytes:
    """An answer to `query` with its question and `rcode`."""
    return _without_records(query, _flags_of_failure(query.wire), rcode)


def cut(response: bytes, query: Query) -> bytes:
    """`response` without its records and with TC, for an asker over UDP that would not take it all (RFC 2181 9)."""
    flags = int.from_bytes(response[2:4]) | TC
    return _without_records(query, flags, flags & RCODE)


def aged(wire: bytes, query: Query, rcode: int, age: int) -> bytes:
    """An answer that was read before, `age` seconds later, to `query`: its id and spelling of the name; our OPT, if it has one.

    Raises Malformed when the library does not write what it has read.
    """
    message = _read(wire)
    message.id = query.message.id
    message.question = query.message.question
    for record in _records(message):
        record.ttl = max(0, record.ttl - age)
    return _write(message, query, rcode)


def lifetime_s(answer: Answer, query: Query) -> int:
    """How long `answer` may be kept: 0 when it must not be.

    The lowest TTL in it; for one that says "there is none", no longer than its SOA's minimum says, and never without one
    (RFC 2308 5). A CNAME alone does not answer a question for another type (RFC 2308 2.2).
    """
    message = answer.message
    if message is None or answer.rcode not in (NOERROR, NXDOMAIN) or message.had_tsig:
        return 0
    records = list(_records(message))
    if not records or any(record.rdtype == SIG for record in records):
        return 0
    lowest = min(record.ttl for record in records)
    if answer.rcode == NOERROR and any(query.key.kind in (record.rdtype, ANY) for record in message.answer):
        return lowest
    for record in message.authority:
        if record.rdtype == SOA and isinstance(record[0], dns.rdtypes.ANY.SOA.SOA):
            return min(lowest, record[0].minimum)
    return 0


def as_no_data(answer: Answer) -> Answer:
    """`answer`, which says that there is no such name, saying that the name has no such records (RFC 2308 2.2)."""
    return replace(answer, wire=answer.wire[:3] + bytes((answer.wire[3] & ~RCODE,)) + answer.wire[4:], rcode=NOERROR)


def addresses(answer: Answer) -> Iterator[tuple[bytes, int]]:
    """The addresses in the answer section, packed, each with its TTL."""
    if answer.message is None:
        return
    for record in answer.message.answer:
        family = ADDRESSES.get(record.rdtype)
        if family is not None and record.rdclass == IN:
            yield inet_pton(family, record[0].address), record.ttl


def type_text(kind: int) -> str:
    """AAAA for 28; TYPE4711 for one without a name (RFC 3597 5)."""
    return dns.rdatatype.to_text(dns.rdatatype.RdataType.make(kind))


def rcode_text(rcode: int) -> str:
    """NXDOMAIN for 3; RCODE12 for one without a name."""
    text = dns.rcode.to_text(dns.rcode.Rcode.make(rcode))
    return f"RCODE{text}" if text.isdecimal() else text


def _header(wire: bytes) -> tuple[int, int, int, int, int]:
    # Flags, and how many questions, answers, authorities and additional records it says it has.
    if len(wire) < HEADER.size:
        raise Malformed(f"{len(wire)} bytes")
    _, flags, questions, answers, authorities, additional = HEADER.unpack_from(wire)
    return flags, questions, answers, authorities, additional


def _read(wire: bytes, *, question_only: bool = False, ignore_trailing: bool = False) -> dns.message.Message:
    # Each record is a set of its own, so that order and TTLs stay; keyring False: signatures are for others to check.
    try:
        return dns.message.from_wire(
            wire, False, question_only=question_only, one_rr_per_rrset=True, ignore_trailing=ignore_trailing
        )
    except Exception as error:  # its own exceptions, but ValueError, struct.error and others' too
        raise Malformed(f"{type(error).__name__}: {error}") from error


def _read_whole(wire: bytes) -> dns.message.Message | None:
    try:
        return _read(wire, ignore_trailing=True)
    except Malformed:
        return None


def _write(message: dns.message.Message, query: Query, rcode: int) -> bytes:
    # An OPT record is for those who sent one (RFC 6891 7), and between neighbours: ours, with DO as they had it (RFC 3225 3).
    if query.edns:
        message.use_edns(0, DO if query.key.dnssec_ok else 0, OWN_LIMIT)
    else:
        message.use_edns(False)
    message.set_rcode(dns.rcode.Rcode.make(rcode if query.edns else rcode & RCODE))
    try:
        return message.to_wire(max_size=65535)
    except Exception as error:  # as above
        raise Malformed(f"{type(error).__name__}: {error}") from error


def _without_records(query: Query, flags: int, rcode: int) -> bytes:
    made = dns.message.Message(id=query.message.id)
    made.flags = dns.flags.Flag(flags)
    made.question = query.message.question
    return _write(made, query, rcode)


def _flags_of_failure(query: bytes) -> int:
    return QR | int.from_bytes(query[2:4]) & (OPCODE | RD | CD) | RA


def _records(message: dns.message.Message) -> Iterator[dns.rrset.RRset]:
    yield from message.answer
    yield from message.authority
    yield from message.additional


def _changes_no_answer(message: dns.message.Message) -> bool:
    # Of EDNS, version 0 is all there is: a server says BADVERS to others.
    return message.edns <= 0 and all(option.otype in HOP_BY_HOP for option in message.options)
