"""The event loop: stale events, timers, wake-ups."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from select import EPOLLIN, EPOLLOUT

import pytest

from interceptor.proxy.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    """Closed after the test."""
    made = Loop()
    yield made
    made.close()


def test_a_disposed_socket_hears_no_more_events_and_keeps_its_number_until_the_batch_is_over(loop: Loop) -> None:
    ends = [socket.socketpair() for _ in range(2)]
    heard: list[int] = []

    def ready(index: int) -> None:
        # Both are ready in one batch: whoever comes first disposes of the other.
        heard.append(index)
        other = ends[1 - index][0]
        number = other.fileno()
        loop.dispose(other)
        assert other.fileno() == number

    for index, (near, far) in enumerate(ends):
        far.send(b"x")
        loop.watch(near.fileno(), EPOLLIN, lambda _events, index=index: ready(index))  # type: ignore[misc]
    loop.run_once()
    assert len(heard) == 1
    assert ends[1 - heard[0]][0].fileno() == -1
    loop.unwatch(ends[heard[0]][0].fileno())
    for near, far in ends:
        near.close()
        far.close()


def test_timers_run_in_the_order_of_their_times(loop: Loop) -> None:
    ran: list[str] = []
    loop.later(0.002, lambda: ran.append("second"))
    loop.later(0.001, lambda: ran.append("first"))
    loop.later(0.003, loop.stop)
    loop.run()
    assert ran == ["first", "second"]


def test_a_cancelled_timer_does_not_run(loop: Loop) -> None:
    ran: list[str] = []
    loop.later(0.001, lambda: ran.append("no")).cancel()
    loop.later(0.002, loop.stop)
    loop.run()
    assert ran == []


def test_another_thread_can_wake_it(loop: Loop) -> None:
    heard: list[bytes] = []

    def woken(message: bytes) -> None:
        heard.append(message)
        loop.stop()

    loop.on_wakeup = woken
    waker = threading.Thread(target=lambda: loop.wake(b"!"))
    waker.start()
    loop.run()
    waker.join()
    assert heard == [b"!"]


def test_room_is_told_once_it_is_asked_for(loop: Loop) -> None:
    near, far = socket.socketpair()
    heard: list[int] = []
    loop.watch_arrivals(near.fileno(), heard.append)
    far.send(b"x")
    loop.run_once()
    assert heard == [EPOLLIN]
    # There is room already, and nothing will change: that it is there has to be told all the same.
    loop.watch_room(near.fileno(), heard.append)
    loop.run_once()
    assert heard == [EPOLLIN, EPOLLIN | EPOLLOUT]
    loop.unwatch(near.fileno())
    loop.watch_room(far.fileno(), heard.append)
    loop.run_once()
    assert heard[2:] == [EPOLLOUT]
    near.close()
    far.close()
