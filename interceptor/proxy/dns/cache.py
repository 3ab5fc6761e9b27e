"""Answers kept for as long as their records live (RFC 1035 7.4, RFC 2308), bounded. Asks nobody; the clock is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from interceptor.proxy.dns import messages
from interceptor.proxy.dns.messages import Answer, Key, Query
from interceptor.proxy.flows import Lookup

# Longer is the zone's right, but a proxy that is wrong for a day is worse than a question an hour (CoreDNS's success maximum;
# RFC 2308 5 gives the same order for what is not there).
LONGEST_S = 3600
# Answers ready to be sent, by the bytes of their questions: what is asked over and over in one second. Usually 300 KiB,
# never more than 5 MiB.
MAX_READY = 1024
# A question with EDNS and the longest name has 282 bytes; more is not asked in the same bytes again.
LONGEST_READY = 300


@dataclass(slots=True)
class Kept:
    """An answer as it came, and when: a time of the cache's clock, in seconds."""

    wire: bytes
    rcode: int
    answers: int
    since: float
    until: float

    def same_until(self, now: float) -> float:
        """When an answer made at `now` would say something else: TTLs are whole seconds."""
        return min(self.until, self.since + int(now - self.since) + 1)

    def answer(self, query: Query, now: float) -> bytes:
        """The answer to `query` at `now`: its id, its spelling of the name, what is left of the TTLs, our OPT if it has one.

        Raises Malformed when the library does not write what it has read.
        """
        return messages.aged(self.wire, query, self.rcode, int(now - self.since))


@dataclass(slots=True)
class Ready:
    """An answer without its id, for the second in which its TTLs are right. `limit`: what its asker takes over UDP."""

    wire: bytes
    limit: int
    lookup: Lookup
    until: float


def keepable(answer: Answer, query: Query, now: float, longest_s: float = LONGEST_S) -> Kept | None:
    """`answer` in the form in which it can answer others; None when it depends on more than the question.

    One that lives for 0 seconds can be kept, but only for those who wait for it at this moment.
    """
    if not query.is_plain or answer.message is None or not answer.message.question:
        return None
    until = now + min(messages.lifetime_s(answer, query), longest_s)
    return Kept(answer.wire, answer.rcode, answer.answers, now, until)


class Cache:
    """At most `size` answers; the one not used for longest makes room. Size 0 keeps nothing."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._clock = clock
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._ready: dict[bytes, Ready] = {}

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
        """Keep an answer, unless its time is over already."""
        if kept.until <= self._clock():
            return
        self._kept[key] = kept
        self._kept.move_to_end(key)
        if kept.answers and kept.rcode == messages.NOERROR:
            self._correct_other_family(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def forget(self, key: Key) -> None:
        """Keep no answer for `key`."""
        self._kept.pop(key, None)
        self._ready.clear()  # what was made of it; the others are made anew in a moment

    def ready(self, question: bytes) -> Ready | None:
        """The answer to a message that is `question` behind its id, when the same was asked in this second."""
        ready = self._ready.get(question)
        return ready if ready is not None and self._clock() < ready.until else None

    def make_ready(self, question: bytes, ready: Ready) -> None:
        """Answer `question` with `ready` from now on, for as long as it says the truth."""
        if len(question) > LONGEST_READY:
            return
        if len(self._ready) >= MAX_READY:
            self._ready.clear()  # none lives longer than a second
        self._ready[question] = ready

    def knows_name_of(self, key: Key) -> bool:
        """Whether an answer for the other family's addresses says that the name exists."""
        other = messages.OTHER_FAMILY.get(key.kind)
        kept = self.get(key._replace(kind=other)) if other is not None else None
        return kept is not None and kept.rcode == messages.NOERROR and bool(kept.answers)

    def _correct_other_family(self, key: Key) -> None:
        # A name that has addresses of one family is there: that there is no such name was wrong (RFC 4074 4.2).
        other = messages.OTHER_FAMILY.get(key.kind)
        if other is not None:
            wrong = key._replace(kind=other)
            kept = self._kept.get(wrong)
            if kept is not None and kept.rcode == messages.NXDOMAIN:
                self.forget(wrong)
