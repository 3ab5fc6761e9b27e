"""How long answers are kept, by a clock of the test's own, and that neither they nor names take more room than they may."""

from __future__ import annotations

import ipaddress

import dns.message
import dns.rcode
import dns.rrset
import pytest

from interceptor.proxy.dns import names as names_module
from interceptor.proxy.dns.cache import LONGEST_READY, LONGEST_S, MAX_READY, Cache, Ready, keepable
from interceptor.proxy.dns.messages import read_answer, read_query
from interceptor.proxy.dns.names import GRACE_S, SETS, WAYS, Names
from interceptor.proxy.dns.upstreams import DEAD_AFTER, DISTRUST_S, Upstreams
from interceptor.proxy.flows import Lookup
from interceptor.sockets import Address


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def message(*lines: str, name: str = "www.test.", kind: str = "A", rcode: int = 0) -> tuple[bytes, bytes]:
    """A query and its answer; `lines` are records, those of SOA for the authority section."""
    query = dns.message.make_query(name, kind)
    made = dns.message.make_response(query)
    made.set_rcode(dns.rcode.Rcode(rcode))
    for line in lines:
        owner, ttl, rdtype, text = line.split(" ", 3)
        (made.authority if rdtype in ("SOA", "NS") else made.answer).append(
            dns.rrset.from_text(owner, int(ttl), "IN", rdtype, text)
        )
    return query.to_wire(), made.to_wire()


def put(cache: Cache, clock: Clock, exchanged: tuple[bytes, bytes]) -> None:
    query = read_query(exchanged[0])
    kept = keepable(read_answer(exchanged[1], query), query, clock.now)
    assert kept is not None
    cache.put(query.key, kept)


SOA = "test. {} SOA ns.test. admin.test. 1 2 3 4 {}"


@pytest.mark.parametrize(
    ("exchanged", "seconds"),
    [
        (message("www.test. 30 A 192.0.2.1"), 30),
        (message("www.test. 30 CNAME a.test.", "a.test. 5 A 192.0.2.1"), 5),
        (message("www.test. 30 A 192.0.2.1", "test. 7 NS ns.test."), 7),
        (message("www.test. 999999 A 192.0.2.1"), LONGEST_S),
        (message("www.test. 0 A 192.0.2.1"), 0),
        (message(SOA.format(300, 60)), 60),
        (message(SOA.format(30, 60), rcode=3), 30),
        (message("www.test. 20 CNAME a.test.", SOA.format(300, 60), rcode=3), 20),
        (message(rcode=3), 0),
        (message(), 0),
        (message("www.test. 30 CNAME a.test."), 0),
        (message("www.test. 30 CNAME a.test.", kind="CNAME"), 30),
        (message("www.test. 30 A 192.0.2.1", kind="ANY"), 30),
        (message("test. 7 NS ns.test."), 0),
        (message("www.test. 30 A 192.0.2.1", rcode=2), 0),
        (message("www.test. 2147483648 A 192.0.2.1".replace("2147483648", "2147483647")), LONGEST_S),
    ],
    ids=[
        *(
            "ttl",
            "lowest of a chain",
            "lowest of all sections",
            "no longer than an hour",
            "zero",
            "no data",
            "no name, by SOA's ttl",
        ),
        *(
            "no name behind a CNAME",
            "no name without SOA",
            "nothing",
            "a CNAME alone",
            "a CNAME asked for",
            "ANY",
            "a referral",
        ),
        *("a failure", "the longest ttl"),
    ],
)
def test_an_answer_is_kept_as_long_as_its_records_live(clock: Clock, exchanged: tuple[bytes, bytes], seconds: int) -> None:
    cache = Cache(10, clock)
    put(cache, clock, exchanged)
    key = read_query(exchanged[0]).key
    assert (cache.get(key) is not None) == (seconds > 0)
    clock.now += seconds - 0.001
    assert (cache.get(key) is not None) == (seconds > 0)
    clock.now += 0.001
    assert cache.get(key) is None
    assert len(cache) == 0


def test_the_one_not_used_for_longest_makes_room(clock: Clock) -> None:
    cache = Cache(2, clock)
    exchanged = {name: message(f"{name}. 30 A 192.0.2.1", name=f"{name}.") for name in "abc"}
    keys = {name: read_query(query).key for name, (query, _) in exchanged.items()}
    put(cache, clock, exchanged["a"])
    put(cache, clock, exchanged["b"])
    cache.get(keys["a"])
    put(cache, clock, exchanged["c"])
    assert [name for name in "abc" if cache.get(keys[name])] == ["a", "c"]


def test_no_answer_is_kept_when_told_so_and_none_that_is_very_long(clock: Clock) -> None:
    none = Cache(0, clock)
    put(none, clock, message("www.test. 30 A 192.0.2.1"))
    assert len(none) == 0
    asked, answered = message(*(f"www.test. 30 TXT {'x' * 250}{number}" for number in range(20)), kind="TXT")
    query = read_query(asked)
    assert keepable(read_answer(answered, query), query, clock.now) is None


def test_a_name_is_known_for_its_time_and_a_little_longer(clock: Clock) -> None:
    names = Names(clock)
    names.learn(ipaddress.ip_address("192.0.2.1").packed, "old.test", 30)
    names.learn(ipaddress.ip_address("192.0.2.1").packed, "www.test", 30)
    names.learn(ipaddress.ip_address("2001:db8::1").packed, "v6.test", 30)
    clock.now += 30 + GRACE_S - 0.01
    assert (names.name_of("192.0.2.1"), names.name_of("2001:db8::1")) == ("www.test", "v6.test")
    assert names.name_of("192.0.2.2") is None
    clock.now += 0.01
    assert names.name_of("192.0.2.1") is None


def test_names_take_the_same_room_however_many_there_are(clock: Clock) -> None:
    names = Names(clock)
    size = len(names._table)
    addresses = [ipaddress.ip_address("10.0.0.0") + number for number in range(3 * SETS * WAYS)]
    for number, address in enumerate(addresses):
        names.learn(address.packed, f"n{number}.test", 30 + number)
    known = [number for number, address in enumerate(addresses) if names.name_of(str(address)) == f"n{number}.test"]
    assert len(names._table) == size
    # Those that live longest stay.
    assert len(known) > SETS * WAYS * 0.9
    assert known[0] > SETS * WAYS


def test_a_long_name_is_known_by_its_end(clock: Clock) -> None:
    names = Names(clock)
    names.learn(bytes((10, 0, 0, 2)), "x" * 200 + ".service.test", 30)
    found = names.name_of("10.0.0.2")
    assert found is not None
    assert found.startswith("...x")
    assert found.endswith("x.service.test")
    assert len(found) == names_module.NAME_LIMIT


def test_an_entry_half_written_is_no_name(clock: Clock) -> None:
    names = Names(clock)
    names.learn(bytes((10, 0, 0, 1)), "www.test", 30)
    at = names._table.find(b"www.test")
    names._table[at] = ord("v")
    assert names.name_of("10.0.0.1") is None


def test_a_resolver_that_seems_dead_is_asked_last_for_a_while(clock: Clock) -> None:
    first, second = (Address(ipaddress.ip_address(f"192.0.2.{number}"), 53) for number in (1, 2))
    upstreams = Upstreams((first, second), clock)
    for _ in range(DEAD_AFTER - 1):
        upstreams.silent(first)
    assert upstreams.in_order() == (first, second)
    upstreams.silent(first)
    assert upstreams.in_order() == (second, first)
    clock.now += DISTRUST_S
    assert upstreams.in_order() == (first, second)
    upstreams.silent(first)
    upstreams.answered(first)
    assert upstreams.in_order() == (first, second)


def test_an_answer_that_is_ready_is_so_for_a_second_and_as_long_as_it_is_right(clock: Clock) -> None:
    query, answered = message("www.test. 30 A 192.0.2.1")
    asked = read_query(query)
    kept = keepable(read_answer(answered, asked), asked, clock.now)
    assert kept is not None
    assert kept.same_until(clock.now) == clock.now + 1
    assert kept.same_until(clock.now + 4.5) == clock.now + 5
    assert kept.same_until(clock.now + 29.5) == clock.now + 30
    cache, lookup = Cache(10, clock), Lookup("www.test", "A", "NOERROR", 1, "cache")
    ready = Ready(answered[2:], 512, lookup, kept.same_until(clock.now))
    cache.make_ready(query[2:], ready)
    assert cache.ready(query[2:]) is ready
    clock.now += 1
    assert cache.ready(query[2:]) is None


def test_what_was_wrong_is_not_ready_either(clock: Clock) -> None:
    cache, lookup = Cache(10, clock), Lookup("www.test", "AAAA", "NXDOMAIN", 0, "cache")
    exchanged = message(SOA.format(300, 60), kind="AAAA", rcode=3)
    put(cache, clock, exchanged)
    cache.make_ready(exchanged[0][2:], Ready(exchanged[1][2:], 512, lookup, clock.now + 1))
    put(cache, clock, message("www.test. 30 A 192.0.2.1"))
    assert cache.ready(exchanged[0][2:]) is None


def test_answers_that_are_ready_do_not_take_all_memory(clock: Clock) -> None:
    cache, lookup = Cache(10, clock), Lookup("www.test", "A", "NOERROR", 1, "cache")
    ready = Ready(b"", 512, lookup, clock.now + 1)
    for number in range(2 * MAX_READY):
        cache.make_ready(number.to_bytes(4), ready)
    cache.make_ready(bytes(LONGEST_READY + 1), ready)
    assert sum(cache.ready(number.to_bytes(4)) is not None for number in range(2 * MAX_READY)) <= MAX_READY
    assert cache.ready(bytes(LONGEST_READY + 1)) is None
