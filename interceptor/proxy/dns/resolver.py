"""From a query to its answer: the cache, the exchanges under way, what is remembered and reported. Knows no client's protocol.

Whoever asks what is being asked already waits with the others: one question, however many want to know, is one pair of id
and port to guess (RFC 5452 5).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from interceptor.proxy.dns import messages
from interceptor.proxy.dns.cache import Cache, Kept, Ready, keepable
from interceptor.proxy.dns.exchange import Exchange
from interceptor.proxy.dns.messages import Answer, Key, Malformed, Query
from interceptor.proxy.dns.names import Names
from interceptor.proxy.dns.ports import Ports
from interceptor.proxy.dns.upstreams import Upstreams
from interceptor.proxy.flows import Flow, Lookup
from interceptor.proxy.listeners import Protocol as Transport
from interceptor.proxy.metrics import DNS_QUERIES, RECEIVED, REFUSED, SENT
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.settings import Listener
from interceptor.sockets import Address, SockAddr, sockaddr_text

# Each waiting question may have a socket or two; a flood must not take all that TCP needs.
MAX_WAITING = 1024
FROM_CACHE = "cache"
ID_SIZE = 2  # a message begins with its id (RFC 1035 4.1.1)


class Client(Protocol):
    """Whoever asked."""

    protocol: Transport
    listener: Listener

    def deliver(self, response: bytes, to: Any) -> None:
        """Send `response`; `to` is what was given with the query. Raises OSError when the client is gone."""


class Question:
    """A query that waits, and who asked. `original_dst` is where it was going, when that is known."""

    __slots__ = ("client", "message", "original_dst", "query", "sender", "start", "to")

    def __init__(self, client: Client, sender: SockAddr, to: Any, message: bytes, original_dst: SockAddr | None = None) -> None:
        self.client = client
        self.sender = sender
        self.to = to
        self.message = message
        self.original_dst = original_dst
        self.query: Query | None = None
        self.start = time.monotonic()


class Resolver:
    """Answers questions; made once for each worker. `names` is what all workers share."""

    def __init__(
        self, runtime: Runtime, addresses: tuple[Address, ...], names: Names, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runtime = runtime
        self._upstreams = Upstreams(addresses, clock)
        self._ports = Ports(runtime, self._upstreams.near_ends)
        self._names = names
        self._clock = clock
        self.cache = Cache(runtime.settings.dns_cache_size, clock)
        self._asked: dict[Key, Exchange] = {}  # plain ones, for others to join
        self._exchanges: dict[Exchange, list[Question]] = {}
        self._waiting = 0
        self._sent = SENT.cell("dns")
        self._received = RECEIVED.cell("dns")

    def close(self) -> None:
        """Wait for no answer any more."""
        for exchange, questions in list(self._exchanges.items()):
            exchange.give_up()
            for question in questions:
                self._report(question, 0, "drained")
        self._exchanges.clear()
        self._asked.clear()
        self._waiting = 0
        self._ports.close()

    def ask(self, question: Question) -> bool:
        """Answer `question`, now or later; whether there will be an answer. What is not even a query is dropped and counted."""
        message = question.message
        ready = self.cache.ready(message[ID_SIZE:])
        if ready is not None and (question.client.protocol == "tcp" or len(ready.wire) + ID_SIZE <= ready.limit):
            self._send(question, message[:ID_SIZE] + ready.wire, "cached", None, None, ready.lookup)
            return True
        try:
            question.query = query = messages.read_query(message)
        except Malformed as error:
            return self._refuse_malformed(question, str(error))
        kept = self.cache.get(query.key) if query.is_plain else None
        if kept is not None:
            self._answer_from_cache(question, query, kept)
        elif query.key.kind in messages.TRANSFERS:
            # An answer of many messages, and none that a pod has business with.
            self._deliver(question, messages.failure(query, messages.NOTIMP), None, rcode=messages.NOTIMP)
        elif self._waiting >= MAX_WAITING:
            self._runtime.counts.add(REFUSED, "too_many_dns_queries")
            return False
        elif question.sender in self._upstreams.near_ends:
            # Rules that do not know the proxy bring its own questions back to it, for ever.
            self._runtime.counts.add(REFUSED, "dns_loop")
            return False
        else:
            self._wait(question, query)
        return True

    def _answer_from_cache(self, question: Question, query: Query, kept: Kept) -> None:
        now = self._clock()
        try:
            response = kept.answer(query, now)
        except Malformed:
            self.cache.forget(query.key)
            self._deliver(question, messages.failure(query, messages.SERVFAIL), None, rcode=messages.SERVFAIL)
            return
        lookup = self._deliver(question, response, FROM_CACHE, answers=kept.answers, rcode=kept.rcode)
        if not query.message.options:  # cookies and padding are others every time
            ready = Ready(response[ID_SIZE:], query.limit, lookup, kept.same_until(now))
            self.cache.make_ready(question.message[ID_SIZE:], ready)

    def _wait(self, question: Question, query: Query) -> None:
        self._waiting += 1
        exchange = self._asked.get(query.key) if query.is_plain else None
        if exchange is not None:
            self._exchanges[exchange].append(question)
            return
        exchange = Exchange(self._runtime, self._upstreams, self._ports, query, self._ended)
        self._exchanges[exchange] = [question]
        if query.is_plain:
            self._asked[query.key] = exchange
        exchange.begin()

    def _ended(self, exchange: Exchange) -> None:
        questions = self._exchanges.pop(exchange)
        self._waiting -= len(questions)
        query, answer = exchange.query, exchange.answer
        if query.is_plain:
            del self._asked[query.key]
        if answer is None:
            reason = "no_answer" if exchange.timed_out else "upstream_failed"
            for question in questions:
                assert question.query is not None
                response = messages.failure(question.query, messages.SERVFAIL)
                self._deliver(question, response, None, reason, exchange, rcode=messages.SERVFAIL)
            return
        answer, kept = self._remember(query, answer)
        by = None if exchange.upstream is None else sockaddr_text(exchange.upstream.sockaddr)
        for question in questions:
            assert question.query is not None
            response = _answer_for(question.query, query, answer, kept)
            self._deliver(question, response, by, "answered", exchange, answers=answer.answers, rcode=answer.rcode)

    def _remember(self, query: Query, answer: Answer) -> tuple[Answer, Kept | None]:
        now = self._clock()
        if answer.rcode == messages.NXDOMAIN and self.cache.knows_name_of(query.key):
            answer = messages.as_no_data(answer)
        kept = keepable(answer, query, now)
        if kept is not None:
            self.cache.put(query.key, kept)
        if answer.rcode == messages.NOERROR and answer.answers and query.key.class_ == messages.INTERNET:
            for address, ttl in messages.addresses(answer):
                self._names.learn(address, query.name, ttl)
        return answer, kept

    def _refuse_malformed(self, question: Question, error: str) -> bool:
        message = question.message
        if not messages.is_query(message):
            self._runtime.counts.add(REFUSED, "dns_malformed")
            return False
        self._send(question, messages.error(message, messages.FORMERR), "malformed", error, None, None)
        return True

    def _deliver(
        self,
        question: Question,
        response: bytes,
        by: str | None,
        reason: str = "answered",
        exchange: Exchange | None = None,
        *,
        answers: int = 0,
        rcode: int,
    ) -> Lookup:
        query = question.query
        assert query is not None
        if question.client.protocol == "udp" and len(response) > query.limit:
            response = messages.cut(response, query)
        lookup = Lookup(query.name, messages.type_text(query.key.kind), messages.rcode_text(rcode), answers, by)
        error = exchange.error if exchange is not None and reason != "answered" else None
        self._send(question, response, "cached" if by is FROM_CACHE else reason, error, exchange, lookup)
        return lookup

    def _send(
        self,
        question: Question,
        response: bytes,
        reason: str,
        error: str | None,
        exchange: Exchange | None,
        lookup: Lookup | None,
    ) -> None:
        try:
            question.client.deliver(response, question.to)
        except OSError as failure:
            reason, error = "client_failed", failure.strerror
        self._report(question, len(response), reason, error, exchange, lookup)

    def _report(
        self,
        question: Question,
        received: int,
        reason: str,
        error: str | None = None,
        exchange: Exchange | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        runtime, client = self._runtime, question.client
        seconds = time.monotonic() - question.start
        runtime.counts.add(DNS_QUERIES, reason)
        cells = runtime.counts.cells
        cells[self._sent] += len(question.message)
        cells[self._received] += received
        runtime.record(
            Flow(
                time.time() - seconds,
                client.protocol,
                "dns",
                client.listener,
                question.sender,
                question.original_dst,
                exchange.local if exchange is not None else None,
                len(question.message),
                received,
                seconds * 1000,
                reason,
                error,
                lookup=lookup,
            )
        )


def _answer_for(asked: Query, query: Query, answer: Answer, kept: Kept | None) -> bytes:
    """What `asked` gets when `answer` came to `query`, which is it or another of the same key; `kept` is made of it."""
    if asked.wire[ID_SIZE:] == query.wire[ID_SIZE:]:
        return messages.with_id(answer.wire, query.wire)
    if kept is not None:
        with suppress(Malformed):
            return kept.answer(asked, kept.since)
    failed = messages.failure(asked, answer.rcode)
    # Too long to be written anew, or cut short, and no more to be had: the client may try over TCP.
    return messages.cut(failed, asked)
