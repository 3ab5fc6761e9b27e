"""Peeking at real connections: what is told, that nothing is taken, and that nobody is kept waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from interceptor.proxy.loop import Scheduled
from interceptor.proxy.peek import HOLD_S, MAX_LOOKS, NOTHING, PEEK_SIZE, Names, Peek, names_in
from interceptor.proxy.settings import Kind
from tests.proxy.bridge import tcp_pair
from tests.proxy.test_client_hello import HELLO, hello, openssl_hello, records

BOTH: frozenset[Kind] = frozenset({"sni", "host"})
REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


@dataclass
class Clock:
    """Loop.later, and the calls to come."""

    coming: list[tuple[float, Scheduled]] = field(default_factory=list)

    def later(self, delay_s: float, callback: Callable[[], None]) -> Scheduled:
        self.coming.append((delay_s, Scheduled(callback)))
        return self.coming[-1][1]

    def run(self) -> None:
        for _, scheduled in self.coming:
            if scheduled.callback is not None:
                scheduled.callback()


@dataclass
class Looking:
    """A connection that is being looked at: `client` is the client's own end, `near` the proxy's."""

    client: socket.socket
    near: socket.socket
    clock: Clock = field(default_factory=Clock)
    told: list[Names] = field(default_factory=list)

    def peek(self, kinds: frozenset[Kind] = BOTH) -> Peek:
        return Peek(self.near, kinds, self.clock.later)

    def start(self, kinds: frozenset[Kind] = BOTH) -> Peek:
        """A peek that has begun and knows nothing yet."""
        peek = self.peek(kinds)
        assert peek.start(self.told.append) is None
        return peek

    def send(self, stream: bytes) -> None:
        """Send, and wait until it is at the proxy's end."""
        before = self._waiting()
        self.client.sendall(stream)
        while self._waiting() < before + len(stream):
            pass

    def _waiting(self) -> int:
        try:
            return len(self.near.recv(1 << 20, socket.MSG_PEEK))
        except BlockingIOError:
            return 0


@pytest.fixture
def looking() -> Iterator[Looking]:
    client, near = tcp_pair()
    near.setblocking(False)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, near:
        yield Looking(client, near)


@pytest.mark.parametrize(
    ("stream", "names"),
    [
        (HELLO, Names(sni="example.com", alpn="h2")),
        (records(hello()), NOTHING),
        (REQUEST, Names(host="a.example")),
        (b"SSH-2.0-x\r\n", NOTHING),
    ],
    ids=["tls", "tls without names", "http", "ssh"],
)
def test_what_is_there_already_is_told_at_once_and_left_there(looking: Looking, stream: bytes, names: Names) -> None:
    looking.send(stream)

    assert looking.peek().start(looking.told.append) == names
    assert looking.near.recv(4096) == stream
    assert looking.told == []


@pytest.mark.parametrize(
    ("stream", "names"), [(HELLO, Names(sni="example.com", alpn="h2")), (REQUEST, Names(host="a.example"))]
)
def test_a_second_segment_is_waited_for(looking: Looking, stream: bytes, names: Names) -> None:
    looking.send(stream[:30])
    peek = looking.start()
    looking.send(stream[30:])
    peek.client_ready()

    assert looking.told == [names]
    assert looking.near.recv(4096) == stream


def test_who_sends_a_part_is_held_for_a_bounded_time(looking: Looking) -> None:
    peek = looking.start()
    assert looking.clock.coming == []  # nothing is held up yet
    looking.send(b"GET /")
    peek.client_ready()
    assert [delay_s for delay_s, _ in looking.clock.coming] == [HOLD_S]
    looking.clock.run()

    assert looking.told == [NOTHING]
    assert looking.near.recv(4096) == b"GET /"


def test_a_server_that_speaks_first_is_not_delayed(looking: Looking) -> None:
    peek = looking.start()
    peek.upstream_ready()

    assert looking.told == [NOTHING]


@pytest.mark.parametrize("cut", [0, 1, 30, len(REQUEST)])
def test_bytes_that_were_taken_already_count(looking: Looking, cut: int) -> None:
    if cut < len(REQUEST):
        looking.send(REQUEST[cut:])
    peek = Peek(looking.near, BOTH, looking.clock.later, REQUEST[:cut])

    assert peek.start(looking.told.append) == Names(host="a.example")


def test_a_part_that_was_taken_already_is_held_for_a_bounded_time(looking: Looking) -> None:
    peek = Peek(looking.near, BOTH, looking.clock.later, b"GET /")

    assert peek.start(looking.told.append) is None
    looking.clock.run()
    assert looking.told == [NOTHING]


def test_what_the_client_said_meanwhile_is_told_when_the_server_speaks(looking: Looking) -> None:
    peek = looking.start()
    looking.send(REQUEST)
    peek.upstream_ready()

    assert looking.told == [Names(host="a.example")]


def test_who_sends_byte_by_byte_is_let_go(looking: Looking) -> None:
    peek = looking.start()
    for number in range(MAX_LOOKS):
        looking.send(REQUEST[number : number + 1])
        peek.client_ready()

    assert looking.told == [NOTHING]


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_an_ended_client_is_the_relays_business(looking: Looking, how: str) -> None:
    peek = looking.start()
    if how == "reset":
        looking.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    looking.client.close()
    while not looking.told:
        peek.client_ready()

    assert looking.told == [NOTHING]


def test_names_are_told_once(looking: Looking) -> None:
    peek = looking.start()
    looking.send(REQUEST)
    for _ in range(2):
        peek.client_ready()
        peek.upstream_ready()
    looking.clock.run()

    assert looking.told == [Names(host="a.example")]


def test_a_stopped_peek_calls_nobody(looking: Looking) -> None:
    peek = looking.start()
    looking.send(b"GET /")
    peek.client_ready()
    peek.stop()
    peek.upstream_ready()
    looking.clock.run()

    assert looking.told == []


def test_only_what_is_asked_for_is_looked_for() -> None:
    assert names_in(REQUEST, frozenset({"sni"})) == NOTHING
    assert names_in(openssl_hello("example.com", []), frozenset({"host"})) == NOTHING


def test_an_endless_beginning_is_given_up() -> None:
    assert names_in(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * PEEK_SIZE, BOTH) == NOTHING
    assert names_in(b"GET /" + os.urandom(PEEK_SIZE).hex().encode(), BOTH) == NOTHING
