"""What the splice relay has and the copy relay has not: pipes, and objects that must go by themselves."""

from __future__ import annotations

import gc
import os
import random
import socket
import weakref

import pytest

from interceptor.proxy.loop import Loop
from interceptor.proxy.relay import pipes
from interceptor.proxy.relay.splice import SpliceRelay
from interceptor.proxy.session import Event, Reason
from tests.proxy.bridge import bridged, tcp_pair
from tests.proxy.test_relay import MIB, in_thread, read_all


@pytest.mark.parametrize("refusal", ["limit", "kernel"])
def test_bulk_without_pipes_is_copied(monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    if refusal == "limit":
        monkeypatch.setattr(pipes, "LIMIT", 0)
    else:
        monkeypatch.setattr(pipes, "PIPE_SIZE", 1 << 31)  # F_SETPIPE_SZ says EINVAL, as it says EPERM over a user's limit
    content = random.Random(5).randbytes(8 * MIB)
    with bridged(SpliceRelay) as bridge:
        bridge.start()
        writer = in_thread(lambda: (bridge.client.sendall(content), bridge.client.shutdown(socket.SHUT_WR)))
        assert read_all(bridge.server) == content
        writer.join()
        bridge.server.close()
        assert bridge.wait().reason is Reason.CLOSED
        assert isinstance(bridge._relay, SpliceRelay)
        assert bridge._relay.pipes.refused > 0


def test_a_pipe_with_bytes_left_is_never_used_again() -> None:
    pool = pipes.PipePool()
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    first.filled = 1
    pool.give_back(first)
    pool.give_back(second)
    assert pool.take() is second
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first.reading)
    pool.give_back(second)
    pool.close()


def test_a_relay_that_was_stopped_is_forgotten_at_once() -> None:
    """By its reference count: thousands that end in a second must not wait for the collector."""
    loop = Loop()
    relay = SpliceRelay(loop)
    (client, near), (far, server) = tcp_pair(), tcp_pair()
    for sock in (near, far):
        sock.setblocking(False)

    class Told:
        def feed(self, event: Event, number: int = 0) -> None:
            raise AssertionError((event, number))

    told = Told()
    running = relay.join(near, far, told)
    running.start(b"")
    running.stop()
    loop.dispose(near)
    loop.dispose(far)
    gone = weakref.ref(told)
    gc.disable()
    try:
        del running, told
        assert gone() is None
    finally:
        gc.enable()
    relay.close()
    loop.close()
    client.close()
    server.close()
