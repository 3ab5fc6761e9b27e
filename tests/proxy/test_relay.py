"""The suite every relay passes: what the peers see through it is what they would have seen without it."""

from __future__ import annotations

import errno
import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from interceptor.proxy.loop import Loop
from interceptor.proxy.relay.base import Relay
from interceptor.proxy.relay.copy import CHUNK_SIZE, CopyRelay
from interceptor.proxy.relay.pipes import PIPE_SIZE
from interceptor.proxy.relay.splice import SpliceRelay
from interceptor.proxy.session import Reason, Side
from interceptor.sockets import reset_on_close
from tests.proxy.bridge import DEADLINE_S, Bridge, bridged

RELAYS: dict[str, Callable[[Loop], Relay]] = {"copy": CopyRelay, "splice": SpliceRelay}
MIB = 1024 * 1024
BOTH_WAYS = pytest.mark.parametrize("speaker", list(Side), ids=lambda side: f"from {side.value}")


@pytest.fixture(params=list(RELAYS.values()), ids=list(RELAYS))
def bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    """Not started."""
    with bridged(request.param) as made:
        yield made


def ends(bridge: Bridge, speaker: Side) -> tuple[socket.socket, socket.socket]:
    """(the speaker's socket, the listener's)."""
    return (bridge.client, bridge.server) if speaker is Side.CLIENT else (bridge.server, bridge.client)


def counts(bridge: Bridge, speaker: Side) -> tuple[int, int]:
    """(bytes from the speaker, bytes to it)."""
    assert bridge.running is not None
    pair = bridge.running.sent, bridge.running.received
    return pair if speaker is Side.CLIENT else pair[::-1]


def read_all(sock: socket.socket) -> bytes:
    """Everything until FIN. A reset raises."""
    chunks = []
    while chunk := sock.recv(1 << 18):
        chunks.append(chunk)
    return b"".join(chunks)


def read_into(got: bytearray, sock: socket.socket) -> None:
    """Everything until FIN, into `got`: what came before a reset is kept."""
    while chunk := sock.recv(65536):
        got += chunk


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """`work` on its way."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@BOTH_WAYS
def test_half_close_ends_one_direction_and_leaves_the_other(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    speaking.sendall(b"question")
    speaking.shutdown(socket.SHUT_WR)
    assert read_all(listening) == b"question"
    listening.sendall(b"answer after the end of the question")
    listening.close()
    assert read_all(speaking) == b"answer after the end of the question"
    assert bridge.wait().reason is Reason.CLOSED
    assert counts(bridge, speaker) == (8, 36)


@BOTH_WAYS
def test_reset_arrives_as_reset(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    speaking.sendall(b"x")
    assert listening.recv(1) == b"x"
    reset_on_close(speaking)
    speaking.close()
    with pytest.raises(ConnectionResetError):
        listening.recv(1)
    assert bridge.wait().errno == errno.ECONNRESET


@BOTH_WAYS
def test_reset_after_half_close_arrives_as_reset(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    listening.shutdown(socket.SHUT_WR)
    assert read_all(speaking) == b""
    reset_on_close(speaking)
    speaking.close()
    with pytest.raises(ConnectionResetError):
        listening.recv(1)


@BOTH_WAYS
def test_bytes_before_a_reset_are_delivered(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    # Closing with unread input makes the kernel send RST right behind the answer: a server that answers early.
    listening.sendall(b"never read")
    wait_until(lambda: bool(speaking.recv(1, socket.MSG_PEEK)))
    speaking.sendall(b"a" * 50_000)
    speaking.close()
    got = bytearray()
    with pytest.raises(ConnectionResetError):
        read_into(got, listening)
    assert bytes(got) == b"a" * 50_000


@BOTH_WAYS
def test_a_receiver_that_resets_while_being_written_to_resets_the_sender(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    speaking.sendall(b"x" * 1000)
    wait_until(lambda: len(listening.recv(1000, socket.MSG_PEEK)) == 1000)
    listening.close()

    def write_on() -> None:
        while True:
            speaking.sendall(b"y" * 65536)

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        write_on()
    assert bridge.wait().reason is (Reason.UPSTREAM_FAILED if speaker is Side.CLIENT else Reason.CLIENT_FAILED)


@BOTH_WAYS
def test_one_byte(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    speaking.sendall(b"1")
    assert listening.recv(10) == b"1"
    wait_until(lambda: counts(bridge, speaker) == (1, 0))


@pytest.mark.slow
def test_64_mib_in_both_directions_at_once_arrive_whole(bridge: Bridge) -> None:
    up, down = random.Random(1).randbytes(64 * MIB), random.Random(2).randbytes(64 * MIB)
    bridge.start()
    got: dict[str, bytes] = {}

    def send(sock: socket.socket, content: bytes) -> None:
        sock.sendall(content)
        sock.shutdown(socket.SHUT_WR)

    threads = [
        in_thread(lambda: send(bridge.client, up)),
        in_thread(lambda: send(bridge.server, down)),
        in_thread(lambda: got.update(server=read_all(bridge.server))),
        in_thread(lambda: got.update(client=read_all(bridge.client))),
    ]
    for thread in threads:
        thread.join(60)
    assert hashlib.sha256(got["server"]).digest() == hashlib.sha256(up).digest()
    assert hashlib.sha256(got["client"]).digest() == hashlib.sha256(down).digest()
    assert bridge.wait().reason is Reason.CLOSED
    assert counts(bridge, Side.CLIENT) == (64 * MIB, 64 * MIB)


@pytest.mark.slow
@BOTH_WAYS
def test_a_receiver_that_does_not_read_stops_the_sender(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    sent = push_until_stuck(speaking)
    # Two sockets' send and receive queues are the kernel's affair; what is beyond them is the relay's.
    assert sent <= 2 * (kernel_limit("tcp_rmem") + kernel_limit("tcp_wmem")) + max(CHUNK_SIZE, PIPE_SIZE)
    speaking.settimeout(DEADLINE_S)
    speaking.shutdown(socket.SHUT_WR)
    assert len(read_all(listening)) == sent


@pytest.mark.slow
def test_two_slow_readers_get_everything(bridge: Bridge) -> None:
    up, down = random.Random(3).randbytes(16 * MIB), random.Random(4).randbytes(16 * MIB)
    bridge.start()
    got: dict[str, bytes] = {}

    def send(sock: socket.socket, content: bytes) -> None:
        sock.sendall(content)
        sock.shutdown(socket.SHUT_WR)

    def read_slowly(sock: socket.socket, name: str) -> None:
        mine = bytearray()
        while chunk := sock.recv(100_000):
            mine += chunk
            time.sleep(0.001)
        got[name] = bytes(mine)

    threads = [
        in_thread(lambda: send(bridge.client, up)),
        in_thread(lambda: send(bridge.server, down)),
        in_thread(lambda: read_slowly(bridge.server, "server")),
        in_thread(lambda: read_slowly(bridge.client, "client")),
    ]
    for thread in threads:
        thread.join(60)
    assert (got["server"] == up, got["client"] == down) == (True, True)
    bridge.wait()
    assert counts(bridge, Side.CLIENT) == (16 * MIB, 16 * MIB)


@BOTH_WAYS
def test_a_peer_that_was_reset_before_the_start_resets_the_other(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    reset_on_close(speaking)
    speaking.close()
    bridge.start()
    with pytest.raises(ConnectionResetError):
        listening.recv(1)


@BOTH_WAYS
def test_a_peer_that_spoke_and_left_before_the_start_is_heard(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    speaking.sendall(b"gone")
    speaking.close()
    bridge.start()
    assert read_all(listening) == b"gone"


@BOTH_WAYS
def test_an_answer_before_a_reset_is_heard_although_the_question_cannot_be_delivered(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    speaking.sendall(b"question")
    listening.sendall(b"too early an answer")
    reset_on_close(listening)
    listening.close()
    bridge.start()
    got = bytearray()
    with pytest.raises(ConnectionResetError):
        read_into(got, speaking)
    assert bytes(got) == b"too early an answer"


@BOTH_WAYS
def test_a_reset_waits_for_a_receiver_that_is_about_to_read(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
    bridge.start()
    speaking.sendall(b"a" * 400_000)
    wait_until(lambda: counts(bridge, speaker)[0] == 400_000)
    reset_on_close(speaking)
    speaking.close()
    bridge.wait()
    got = bytearray()
    with pytest.raises(ConnectionResetError):
        read_into(got, listening)
    assert len(got) == 400_000


def test_both_fins_at_once_close_in_order(bridge: Bridge) -> None:
    bridge.client.sendall(b"c")
    bridge.server.sendall(b"ss")
    bridge.client.shutdown(socket.SHUT_WR)
    bridge.server.shutdown(socket.SHUT_WR)
    bridge.start()
    assert (read_all(bridge.server), read_all(bridge.client)) == (b"c", b"ss")
    assert bridge.wait().reason is Reason.CLOSED


@pytest.mark.slow
@BOTH_WAYS
def test_a_reset_behind_a_reader_that_does_not_read_does_not_spin(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    push_until_stuck(speaking)
    reset_on_close(speaking)
    speaking.close()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    with pytest.raises(ConnectionResetError):
        read_into(bytearray(), listening)


def kernel_limit(name: str) -> int:
    """The most bytes one socket's queue may hold (tcp(7))."""
    with open(f"/proc/sys/net/ipv4/{name}") as file:
        return int(file.read().split()[2])


def push_until_stuck(sock: socket.socket) -> int:
    """Write until nothing is taken for a while; how much was taken."""
    sock.settimeout(0.3)
    sent = 0
    try:
        while sent < 256 * MIB:
            sent += sock.send(b"p" * 65536)
    except TimeoutError:
        pass
    return sent


def wait_until(condition: Callable[[], bool]) -> None:
    """Until `condition` holds, or fail."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@BOTH_WAYS
def test_a_preface_goes_first(bridge: Bridge, speaker: Side) -> None:
    speaking, listening = ends(bridge, speaker)
    speaking.sendall(b"x")
    speaking.shutdown(socket.SHUT_WR)
    bridge.start(b"preface ")
    assert read_all(listening) == (b"preface x" if speaker is Side.CLIENT else b"x")


@BOTH_WAYS
def test_bytes_behind_urgent_data_do_not_wait(bridge: Bridge, speaker: Side) -> None:
    """A read stops at the mark, and an edge is told once."""
    speaking, listening = ends(bridge, speaker)
    bridge.start()
    speaking.sendall(b"before")
    speaking.send(b"!", socket.MSG_OOB)
    speaking.sendall(b"behind")
    speaking.shutdown(socket.SHUT_WR)
    # The urgent byte itself is lost on the way, as in every relay that does not look for it.
    assert read_all(listening).replace(b"!", b"") == b"beforebehind"
