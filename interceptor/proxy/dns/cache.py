"""Answers kept for as long as their records live (RFC 1035 7.4, RFC 2308), bounded. Asks nobody; the clock is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from interceptor.proxy.dns import wire
from interceptor.proxy.dns.wire import Answer, Key, Query, Record

# Longer is the zone's right, but a proxy that is wrong for a day is worse than a question an hour (CoreDNS's success maximum;
# RFC 2308 5 gives the same order for what is not there).
LONGEST_S = 3600
# Larger answers are rare, and are fetched again: with the entries counted, this bounds the memory.
LARGEST = 4096
OTHER_FAMILY = {wire.A: wire.AAAA, wire.AAAA: wire.A}


@dataclass(slots=True)
class Kept:
    """An answer without OPT, and when it came: a time of the cache's clock, in seconds."""

    wire: bytes
    records: tuple[Record, ...]
    rcode: int
    answers: int
    since: float
    until: float

    def answer(self, query: Query, now: float) -> bytes:
        """The answer to `query` at `now`: its id, its spelling of the name, what is left of the TTLs, our OPT if it has one."""
        end = query.question_end
        copy = wire.with_ttls(self.wire, self.records, int(now - self.since))
        copy[:2] = query.wire[:2]
        copy[wire.HEADER_SIZE : end] = query.wire[wire.HEADER_SIZE : end]
        return wire.with_own_opt(bytes(copy), query, self.rcode)


def keepable(answer: Answer, query: Query, now: float, longest_s: float = LONGEST_S) -> Kept | None:
    """`answer` in the form in which it can answer others; None when it depends on more than the question.

    One that lives for 0 seconds can be kept, but only for those who wait for it at this moment.
    """
    if not query.is_plain or answer.is_truncated or answer.question_end != query.question_end:
        return None
    bare = wire.without_opt(answer)
    if bare is None:
        return None
    until = now + min(wire.lifetime_s(answer, query), longest_s)
    return Kept(bare, answer.records, answer.rcode, answer.answers, now, until)


class Cache:
    """At most `size` answers; the one not used for longest makes room. Size 0 keeps nothing."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._clock = clock
        self._kept: OrderedDict[Key, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Kept | None:
        """What is kept for `key`, if it still lives."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        if self._clock() >= kept.until:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return kept

    def put(self, key: Key, kept: Kept) -> None:
        """Keep an answer, unless its time is over already or it is too large."""
        if kept.until <= self._clock() or len(kept.wire) > LARGEST:
            return
        self._kept[key] = kept
        self._kept.move_to_end(key)
        if kept.answers and kept.rcode == wire.NOERROR:
            self._correct_other_family(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def knows_name_of(self, key: Key) -> bool:
        """Whether an answer for the other family's addresses says that the name exists."""
        other = OTHER_FAMILY.get(key.kind)
        kept = self.get(key._replace(kind=other)) if other is not None else None
        return kept is not None and kept.rcode == wire.NOERROR and bool(kept.answers)

    def _correct_other_family(self, key: Key) -> None:
        # A name that has addresses of one family is there: that there is no such name was wrong (RFC 4074 4.2).
        other = OTHER_FAMILY.get(key.kind)
        if other is not None:
            wrong = key._replace(kind=other)
            kept = self._kept.get(wrong)
            if kept is not None and kept.rcode == wire.NXDOMAIN:
                del self._kept[wrong]
