"""Whatever the bytes, our use of the library raises nothing but our own error; and what is answered says what was asked for."""

from __future__ import annotations

import contextlib

import dns.flags
import dns.message
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.proxy.dns import messages
from interceptor.proxy.dns.cache import keepable
from interceptor.proxy.dns.messages import LARGEST, Malformed, Query, read_answer, read_query
from tests.property.dns_messages import answers, changed, hostile, queries


def records(message: dns.message.Message) -> list[tuple[int, int]]:
    """Type and TTL of each record, in order; those of one set with its TTL, as dnspython holds them."""
    return [(int(rrset.rdtype), rrset.ttl) for section in message.sections[1:] for rrset in section for _ in rrset]


def use_query(wire: bytes) -> Query | None:
    """All that is done with a query; None when it is malformed. Nothing else may be raised."""
    try:
        query = read_query(wire)
    except Malformed:
        if messages.is_query(wire):
            assert dns.message.from_wire(messages.error(wire, messages.FORMERR)).id == int.from_bytes(wire[:2])
        return None
    assert query.name
    assert messages.type_text(query.key.kind)
    failed = messages.failure(query, messages.SERVFAIL)
    for made in (failed, messages.cut(failed, query)):
        assert made[:2] == wire[:2]
        assert len(made) <= messages.SMALLEST_LIMIT
    return query


def use_answer(wire: bytes, query: Query) -> None:
    """All that is done with an answer. Nothing may be raised."""
    with contextlib.suppress(Malformed):
        answer = read_answer(wire, query)
        assert messages.rcode_text(answer.rcode)
        assert messages.lifetime_s(messages.as_no_data(answer), query) >= 0
        assert all(len(address) in (4, 16) for address, _ in messages.addresses(answer))
        messages.cut(answer.wire, query)
        kept = keepable(answer, query, 0.0)
        if kept is not None:
            kept.answer(query, 1.0)


@given(queries())
def test_a_query_is_read_as_it_was_meant(query: dns.message.Message) -> None:
    found = read_query(query.to_wire())
    [question] = query.question
    assert found.key.name == question.name.canonicalize().labels
    assert (found.key.kind, found.key.class_) == (question.rdtype, question.rdclass)
    assert (found.edns, found.limit) == (query.edns == 0, max(512, query.payload if query.edns == 0 else 0))
    assert found.key.dnssec_ok == bool(query.ednsflags & dns.flags.DO)
    assert found.is_plain


@given(st.data(), st.integers(0, 2**31))
def test_a_kept_answer_says_the_same_with_less_time(data: st.DataObject, age: int) -> None:
    query = data.draw(queries())
    made = data.draw(answers(query)).to_wire(max_size=65535)
    asked = read_query(query.to_wire())
    kept = keepable(read_answer(made, asked), asked, now=0.0)
    assert kept is not None
    before = dns.message.from_wire(made, one_rr_per_rrset=True)
    after = dns.message.from_wire(kept.answer(asked, float(age)), one_rr_per_rrset=True)
    assert records(after) == [(kind, max(0, ttl - age)) for kind, ttl in records(before)]
    assert [rrset.items for rrset in after.answer] == [rrset.items for rrset in before.answer]
    assert (after.id, after.question, after.rcode(), after.edns) == (before.id, before.question, before.rcode(), before.edns)


@given(st.data())
def test_changed_messages_raise_nothing_but_malformed(data: st.DataObject) -> None:
    query = data.draw(queries())
    use_query(data.draw(changed(query.to_wire())))
    use_answer(data.draw(changed(data.draw(answers(query)).to_wire(max_size=65535))), read_query(query.to_wire()))


@given(hostile())
def test_messages_put_together_at_random_raise_nothing_but_malformed(message: bytes) -> None:
    query = use_query(message)
    if query is not None:
        use_answer(message[:2] + bytes((message[2] | 0x80,)) + message[3:], query)


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_malformed(message: bytes) -> None:
    use_query(message)
    use_answer(message, read_query(dns.message.make_query("test", "A").to_wire()))


POINTERS = b"".join((0xC000 | max(12, at - 2)).to_bytes(2) for at in range(36, LARGEST - 12, 2))


@pytest.mark.parametrize(
    "behind",
    [
        b"",
        b"\xc0\x0c",
        b"\xc0\x0c\0\1\0\1" + b"\0\0\0\0\0\4\1\2\3",
        b"\xc0\xff\0\1\0\1\0\0\0\0\0\4\1\2\3\4",
        b"\xc0\x1c\xc0\x1c",
        b"\0\0\x29\x04\xd0\0\0\0\0\0\1\0",
        b"\0\0\x29\x04\xd0\0\0\0\0\0\4\0\x08\0\xff",
        b"\4test\0\0\x29\x04\xd0\0\0\0\0\0\0",
        b"\0\0\xfa\0\xff\0\0\0\0\0\1\0",
        b"\0\0\x18\0\xff\0\0\0\0\0\1\0",
        b"\0\0\1\0\1\0\0\0\0\0\0",
        b"\xc0\x0c\0\6\0\1\0\0\0\0\0\2\xc0\x0c",
        b"\xc0\x0c\0\1\0\3\0\0\0\x3c\0\4\1\2\3\4",
        b"\xc0\x0c\0\x41\0\1\0\0\0\x3c\0\3\0\0\xc0",
        b"\x7f" * 100,
        POINTERS,
    ],
    ids=[
        *("nothing", "a name alone", "data cut", "a pointer behind itself", "a pointer to itself", "an option cut"),
        *("a subnet that is none", "OPT with a name", "a signature cut", "SIG cut", "an address of 0 bytes", "SOA cut"),
        *("an address of Chaosnet", "HTTPS without its name", "labels of type 01", "pointers to pointers"),
    ],
)
@pytest.mark.parametrize("counts", [(0, 0, 1), (1, 0, 0), (0, 1, 0), (0, 0, 0xFFFF), (0xFFFF, 0xFFFF, 0xFFFF)])
def test_known_faults_raise_nothing_but_malformed(behind: bytes, counts: tuple[int, int, int]) -> None:
    question = b"\4test\0\0\1\0\1"
    numbers = b"\0\1" + b"".join(count.to_bytes(2) for count in counts)
    use_query(b"\x12\x34\x01\x00" + numbers + question + behind)
    asked = read_query(b"\x12\x34\x01\x00\0\1\0\0\0\0\0\0" + question)
    use_answer(b"\x12\x34\x81\x80" + numbers + question + behind, asked)


def test_an_answer_with_a_record_that_cannot_be_read_is_an_answer_that_is_not_kept() -> None:
    query = read_query(dns.message.make_query("test", "HTTPS").to_wire())
    faulty = query.wire[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + b"\4test\0\0\x41\0\1" + b"\xc0\x0c\0\x41\0\1\0\0\0\x3c\0\3\0\0\xc0"
    answer = read_answer(faulty, query)
    assert (answer.message, answer.answers, answer.wire) == (None, 1, faulty)
    assert keepable(answer, query, 0.0) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"\0", "."),
        (b"\3wWw\4test\0", "www.test"),
        (b"\3a.b\4\x00\xff\\x\0", r"a\.b.\000\255\\x"),
        (b"\5_http\2a-\0", "_http.a-"),
    ],
)
def test_names_are_written_as_in_zone_files(name: bytes, text: str) -> None:
    assert read_query(b"\0\0\1\0\0\1\0\0\0\0\0\0" + name + b"\0\1\0\1").name == text
