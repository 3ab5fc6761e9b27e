"""One question on its way to the resolvers: its sockets, its tries, its end. Keeps no answer and knows no client.

What does not fit the question is not an answer, and the wait goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from select import EPOLLERR, EPOLLHUP
from socket import SocketType
from typing import TypeAlias

from interceptor.proxy.dns import messages
from interceptor.proxy.dns.messages import Answer, Malformed, Query
from interceptor.proxy.dns.ports import MAX_MESSAGE, Ports, random_ids
from interceptor.proxy.dns.upstreams import Upstreams
from interceptor.proxy.flows import errno_name
from interceptor.proxy.loop import STREAM, Scheduled
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.upstream import UpstreamError, connect
from interceptor.sockets import Address, SockAddr

# A stub resolver asks again after 5 s (resolv.conf(5), "timeout"): it should hear of a failure before.
ANSWER_TIMEOUT_S = 4.5
# With no word from one resolver, the next is asked as well; and each once more, as datagrams may be lost.
STAGGER_S = 1.0
ROUNDS = 2

OnEnd: TypeAlias = Callable[["Exchange"], None]


# For streams; ports have their own.
_IDS = random_ids()


class Exchange:
    """Asks for `query` and calls `on_end` once, when `answer`, `error`, `upstream` and `local` are known."""

    __slots__ = (
        *("_bad", "_left", "_on_end", "_parallel", "_ports", "_runtime", "_silent", "_timer", "_tries", "_until", "_upstreams"),
        *("answer", "error", "local", "query", "timed_out", "upstream"),
    )

    def __init__(self, runtime: Runtime, upstreams: Upstreams, ports: Ports, query: Query, on_end: OnEnd) -> None:
        self.query = query
        self.answer: Answer | None = None
        self.upstream: Address | None = None  # whose answer it is
        self.local: SockAddr | None = None
        self.error: str | None = None  # what failed last, when nobody answered
        self.timed_out = False
        self._runtime = runtime
        self._upstreams = upstreams
        self._ports = ports
        self._on_end: OnEnd | None = on_end
        self._bad: Answer | None = None
        self._tries: list[_Try] = []
        order = upstreams.in_order()
        self._left = [*order] * ROUNDS  # still to be asked
        self._parallel = len(order) if runtime.settings.dns_parallel else 1
        self._until = 0.0
        self._silent: set[Address] = set()
        self._timer: Scheduled | None = None

    def begin(self) -> None:
        """Ask; `on_end` may be called before this returns."""
        self._timer = self._runtime.loop.later(STAGGER_S, self._no_word)
        for _ in range(self._parallel):
            if self._on_end is not None:
                self._ask_next()

    def give_up(self) -> None:
        """End without an answer, and without a word."""
        self._on_end = None
        self._close()

    def _ask_next(self, under_way: frozenset[Address] = frozenset()) -> None:
        # `under_way` are those that may still answer, and need not be asked again so soon.
        while (upstream := next((each for each in self._left if each not in under_way), None)) is not None:
            self._left.remove(upstream)
            try:
                self._tries.append(_Datagram(self, self._ports, upstream))
            except UpstreamError as error:
                self.error = str(error)
                self._silent.add(upstream)
                self._left = [each for each in self._left if each != upstream]
            else:
                return
        if not self._tries:
            self._end()

    def _no_word(self) -> None:
        self._until += STAGGER_S
        self._silent |= {each.upstream for each in self._tries}
        if self._until >= ANSWER_TIMEOUT_S:
            self.timed_out = True
            self._end()
            return
        self._timer = self._runtime.loop.later(min(STAGGER_S, ANSWER_TIMEOUT_S - self._until), self._no_word)
        if self._left:
            self._ask_next()

    def heard(self, one: _Try, answer: Answer) -> None:
        """`one` has an answer that fits."""
        if answer.is_truncated and isinstance(one, _Datagram):
            # It stays the answer if there is none over TCP: the client can try for itself.
            self._answered(one)
            self._bad = answer
            self._replace(one)
        elif answer.rcode in messages.FINAL:
            self._answered(one)
            self._end(one, answer)
        else:
            self._answered(one)
            if self._bad is None or not self._bad.is_truncated:
                self._bad, self.upstream, self.local = answer, one.upstream, one.local
            self._drop(one)
            self._without(one.upstream, messages.rcode_text(answer.rcode))

    def lost(self, one: _Try, error: str) -> None:
        """`one` will bring nothing."""
        self._drop(one)
        if isinstance(one, _Datagram):  # over TCP, it is one that has answered
            self._silent.add(one.upstream)
        self._without(one.upstream, error)

    def _answered(self, one: _Try) -> None:
        self._silent.discard(one.upstream)
        self._upstreams.answered(one.upstream)

    def _without(self, upstream: Address, error: str) -> None:
        # A second try is for silence: one that refused is not asked again, and the next is, at once.
        self.error = error
        self._left = [each for each in self._left if each != upstream]
        self._ask_next(frozenset(each.upstream for each in self._tries))

    def _replace(self, one: _Try) -> None:
        self._drop(one)
        self.upstream, self.local = one.upstream, one.local
        try:
            self._tries.append(_Stream(self, self._runtime, self._upstreams.near_ends, one.upstream))
        except UpstreamError as error:
            self._without(one.upstream, str(error))

    def _drop(self, one: _Try) -> None:
        if one in self._tries:
            self._tries.remove(one)
            one.close()

    def _end(self, one: _Try | None = None, answer: Answer | None = None) -> None:
        if one is not None:
            self.upstream, self.local = one.upstream, one.local
        self.answer = answer or self._bad
        for each in self._silent:
            self._upstreams.silent(each)
        self._close()
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(self)

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for each in tuple(self._tries):
            self._drop(each)


class _Datagram:
    """One try over UDP."""

    __slots__ = ("_exchange", "_id", "_port", "local", "upstream")

    def __init__(self, exchange: Exchange, ports: Ports, upstream: Address) -> None:
        self._exchange = exchange
        self.upstream = upstream
        self._port, self._id = ports.ask(upstream, exchange.query.wire, self)
        self.local: SockAddr = self._port.local

    def close(self) -> None:
        """Wait no more."""
        self._port.forget(self._id)

    def take(self, message: bytes) -> bool:
        """As ports.Asking."""
        try:
            answer = messages.read_answer(message, self._exchange.query)
        except Malformed:
            return False
        self._exchange.heard(self, answer)
        return True

    def lose(self, error: str) -> None:
        """As ports.Asking."""
        self._exchange.lost(self, error)


class _Stream:
    """One try over TCP, for an answer that was too long for a datagram (RFC 7766 5)."""

    __slots__ = ("_exchange", "_id", "_near_ends", "_received", "_runtime", "_unsent", "local", "sock", "upstream")

    def __init__(self, exchange: Exchange, runtime: Runtime, near_ends: set[SockAddr], upstream: Address) -> None:
        self._exchange = exchange
        self._runtime = runtime
        self._near_ends = near_ends
        self._id = next(_IDS)
        question = messages.with_id(exchange.query.wire, self._id)
        self._unsent = len(question).to_bytes(2) + question
        self._received = bytearray()
        self.upstream = upstream
        self.sock: SocketType = runtime.open_upstream("dns", upstream.sockaddr, upstream.sockaddr)
        connect(self.sock, upstream.sockaddr)
        self.local: SockAddr = self.sock.getsockname()
        near_ends.add(self.local)
        runtime.loop.watch(self.sock.fileno(), STREAM, self._ready)

    def close(self) -> None:
        """Close the connection, whatever was said on it."""
        self._near_ends.discard(self.local)
        self._runtime.loop.dispose(self.sock)

    def _ready(self, events: int) -> None:
        try:
            if self._unsent and not events & (EPOLLERR | EPOLLHUP):
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
            while chunk := self.sock.recv(MAX_MESSAGE):
                self._received += chunk
        except BlockingIOError:
            ended = False
        except OSError as error:
            self._exchange.lost(self, f"TCP: {errno_name(error.errno or 0)}")
            return
        else:
            ended = True
        self._look(ended)

    def _look(self, ended: bool) -> None:
        received = self._received
        size = int.from_bytes(received[:2]) if len(received) >= 2 else MAX_MESSAGE
        if len(received) < size + 2:
            if ended:
                self._exchange.lost(self, "TCP: closed without an answer")
            return
        message = bytes(received[2 : size + 2])
        if message[:2] != self._id:
            self._exchange.lost(self, "TCP: an answer to another question")
            return
        try:
            answer = messages.read_answer(message, self._exchange.query)
        except Malformed as error:
            self._exchange.lost(self, f"TCP: {error}")
        else:
            self._exchange.heard(self, answer)


_Try: TypeAlias = _Datagram | _Stream
