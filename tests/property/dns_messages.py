"""DNS messages as dnspython makes them, and the same with bytes changed."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
from hypothesis import strategies as st

LABELS = st.binary(min_size=1, max_size=20)
NAMES = st.lists(LABELS, max_size=5).map(lambda labels: dns.name.Name((*labels, b"")))
TTLS = st.integers(0, 2**31 - 1)
DATA = {
    "A": "192.0.2.{}",
    "AAAA": "2001:db8::{}",
    "TXT": "text{}",
    "MX": "{} mail.test.",
    "CNAME": "c{}.test.",
    "TYPE4711": r"\# 1 {:02d}",
}
KINDS = st.sampled_from(sorted(DATA))


@st.composite
def queries(draw: st.DrawFn) -> dns.message.Message:
    """A query, with EDNS or without."""
    name, kind, edns = draw(NAMES), draw(KINDS), draw(st.sampled_from([-1, 0]))
    query = dns.message.make_query(
        name, kind, use_edns=edns, payload=draw(st.integers(0, 65535)), want_dnssec=draw(st.booleans())
    )
    query.flags |= draw(st.sampled_from([0, dns.flags.CD, dns.flags.AD]))
    return query


@st.composite
def answers(draw: st.DrawFn, query: dns.message.Message) -> dns.message.Message:
    """An answer to `query` with records in all sections."""
    made = dns.message.make_response(query, recursion_available=True)
    made.set_rcode(dns.rcode.Rcode(draw(st.sampled_from([0, 0, 0, 2, 3, 16 if query.edns == 0 else 5]))))
    for section in (made.answer, made.authority, made.additional):
        for number in range(draw(st.integers(0, 3))):
            kind = draw(KINDS)
            owner = draw(st.one_of(st.just(query.question[0].name), NAMES))
            section.append(dns.rrset.from_text(owner, draw(TTLS), "IN", kind, DATA[kind].format(number)))
    if draw(st.booleans()):
        soa = f"ns.test. admin.test. 1 2 3 4 {draw(TTLS)}"
        made.authority.append(dns.rrset.from_text("test.", draw(TTLS), "IN", "SOA", soa))
    return made


@st.composite
def changed(draw: st.DrawFn, wire: bytes) -> bytes:
    """`wire` with some bytes changed, cut or grown."""
    copy = bytearray(wire)
    for _ in range(draw(st.integers(1, 4))):
        copy[draw(st.integers(0, len(copy) - 1))] = draw(st.integers(0, 255))
    return bytes(copy[: draw(st.integers(0, len(copy)))]) if draw(st.booleans()) else bytes(copy) + draw(st.binary(max_size=8))


def _u16(low: int, high: int) -> st.SearchStrategy[bytes]:
    return st.integers(low, high).map(lambda number: number.to_bytes(2))


POINTER = _u16(0xC000, 0xC080)
LABEL = LABELS.map(lambda label: bytes((len(label),)) + label)
WIRE_NAMES = st.tuples(st.lists(LABEL, max_size=3), st.one_of(st.just(b"\0"), POINTER)).map(
    lambda parts: b"".join((*parts[0], parts[1]))
)
# Every type that the library knows, and some that it does not.
WIRE_TYPES = st.one_of(st.sampled_from([1, 2, 5, 6, 15, 16, 24, 28, 33, 35, 41, 46, 47, 64, 65, 250]), st.integers(0, 65535))


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A header, a question and records that have the shape of such, whose names, types, counts and data are anything."""
    flags = draw(st.sampled_from([0x0100, 0x0000, 0x2800, 0x2000, 0x0120, 0x7800]))
    records = draw(st.lists(st.tuples(WIRE_NAMES, WIRE_TYPES, _u16(0, 4), st.binary(max_size=40), st.booleans()), max_size=4))
    counts = draw(st.lists(_u16(0, 5), min_size=3, max_size=3))
    made = draw(_u16(0, 65535)) + flags.to_bytes(2) + b"\0\1" + b"".join(counts)
    made += draw(WIRE_NAMES) + draw(WIRE_TYPES).to_bytes(2) + draw(_u16(0, 4))
    for name, kind, class_, content, is_honest in records:
        size = len(content) if is_honest else draw(st.integers(0, 60))
        made += name + kind.to_bytes(2) + class_ + draw(st.binary(min_size=4, max_size=4)) + size.to_bytes(2) + content
    return made
