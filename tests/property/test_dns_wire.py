"""What wire.py reads is what dnspython reads; and whatever the bytes, it raises nothing but its own error."""

from __future__ import annotations

import contextlib

import dns.exception
import dns.flags
import dns.message
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.proxy.dns import wire
from interceptor.proxy.dns.cache import keepable
from interceptor.proxy.dns.wire import Malformed, parse_answer, parse_query
from tests.property.dns_messages import answers, changed, queries


def records(message: dns.message.Message) -> list[tuple[int, int]]:
    """Type and TTL of each record, in order; those of one set with its TTL, as dnspython holds them."""
    return [(int(rrset.rdtype), rrset.ttl) for section in message.sections[1:] for rrset in section for _ in rrset]


@given(queries())
def test_a_query_is_read_as_dnspython_reads_it(query: dns.message.Message) -> None:
    sent = query.to_wire()
    found = parse_query(sent)
    [question] = query.question
    assert found.key.name == question.name.canonicalize().to_wire()
    assert (found.key.kind, found.key.class_) == (question.rdtype, question.rdclass)
    assert (found.edns, found.limit) == (query.edns == 0, max(512, query.payload if query.edns == 0 else 0))
    assert found.key.dnssec_ok == bool(query.ednsflags & dns.flags.DO)
    assert found.is_plain


@given(st.data())
def test_an_answer_is_read_as_dnspython_reads_it(data: st.DataObject) -> None:
    query = data.draw(queries())
    made = data.draw(answers(query)).to_wire(max_size=65535)
    oracle = dns.message.from_wire(made, one_rr_per_rrset=True)
    asked = parse_query(query.to_wire())
    found = parse_answer(made, asked)
    assert [(record.kind, record.ttl) for record in found.records] == records(oracle)
    assert (found.rcode, found.opt is not None) == (oracle.rcode(), oracle.edns >= 0)
    assert found.answers == len(oracle.answer)


@given(st.data(), st.integers(0, 2**31))
def test_a_kept_answer_says_the_same_with_less_time(data: st.DataObject, age: int) -> None:
    query = data.draw(queries())
    made = data.draw(answers(query)).to_wire(max_size=65535)
    asked = parse_query(query.to_wire())
    kept = keepable(parse_answer(made, asked), asked, now=0.0)
    assert kept is not None
    before = dns.message.from_wire(made, one_rr_per_rrset=True)
    after = dns.message.from_wire(kept.answer(asked, float(age)), one_rr_per_rrset=True)
    assert records(after) == [(kind, max(0, ttl - age)) for kind, ttl in records(before)]
    assert [rrset.items for rrset in after.answer] == [rrset.items for rrset in before.answer]
    assert (after.id, after.question, after.rcode(), after.edns) == (before.id, before.question, before.rcode(), before.edns)


@given(st.data())
def test_changed_messages_raise_nothing_but_malformed(data: st.DataObject) -> None:
    query = data.draw(queries())
    asked = parse_query(query.to_wire())
    with contextlib.suppress(Malformed):
        other = parse_query(data.draw(changed(query.to_wire())))
        assert wire.name_text(other.key.name)
        dns.message.from_wire(wire.failure(other, wire.SERVFAIL))
    with contextlib.suppress(Malformed):
        answer = parse_answer(data.draw(changed(data.draw(answers(query)).to_wire(max_size=65535))), asked)
        wire.lifetime_s(answer, asked)
        wire.addresses(answer)
        kept = keepable(answer, asked, 0.0)
        if kept is not None:
            kept.answer(asked, 1.0)


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_malformed(message: bytes) -> None:
    with contextlib.suppress(Malformed):
        parse_query(message)
    with contextlib.suppress(Malformed):
        parse_answer(message, parse_query(dns.message.make_query("test", "A").to_wire()))


@given(st.data())
def test_what_dnspython_takes_for_one_question_we_take_too(data: st.DataObject) -> None:
    message = data.draw(changed(data.draw(queries()).to_wire()))
    try:
        read = dns.message.from_wire(message)
    except (dns.exception.DNSException, ValueError):
        return
    if read.flags & dns.flags.QR or len(read.question) != 1 or read.opcode() != 0:
        return
    try:
        found = parse_query(message)
    except Malformed as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        # What dnspython unpacks where nobody should have packed it.
        assert "compressed name" in refused
        return
    assert found.key.name == read.question[0].name.canonicalize().to_wire()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"\0", "."),
        (b"\3www\4test\0", "www.test"),
        (b"\3a.b\4\x00\xff\\x\0", r"a\.b.\000\255\\x"),
        (b"\5_http\2a-\0", "_http.a-"),
    ],
)
def test_names_are_written_as_in_zone_files(name: bytes, text: str) -> None:
    assert wire.name_text(name) == text
