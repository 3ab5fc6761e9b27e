"""Thousands of connections of every shape at once: what each end sees through the proxy is what the other did."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from interceptor import capture
from interceptor.config import Config
from interceptor.sockets import reset_on_close
from tests.proxy.pods import OUTBOUND, PROXY_UID, V4, V6, Pods, client, listen, pods, proxy

pytestmark = [pytest.mark.netns, pytest.mark.torture]
COUNT = 3000
AT_ONCE = 64
SEED = struct.Struct("!Q")
LARGEST = 1 << 20


@pytest.fixture(scope="module")
def world() -> Iterator[Pods]:
    """A pod whose outbound TCP is captured by our own rules.

    With plain REDIRECT rules one connection in a hundred here goes around the proxy, or from the proxy back into it
    (docs/decisions/0002-conntrack-bypass.md).
    """
    with pods("torture") as made:
        capture.enable(Config(inbound="off", backend="nft"), netns=made.pod)
        yield made


def read_all(sock: socket.socket) -> bytes:
    """Everything until FIN. A reset raises."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer when the stream ends before."""
    got = bytearray()
    while len(got) < size and (chunk := sock.recv(size - len(got))):
        got += chunk
    return bytes(got)


def speak_first(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """All of mine, FIN, then all of theirs."""
    sock.sendall(mine)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == theirs


def listen_first(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """All of theirs, then all of mine, FIN."""
    assert read_all(sock) == theirs
    sock.sendall(mine)


def both_at_once(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Mine and theirs at the same time."""

    def send() -> None:
        sock.sendall(mine)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    got = read_all(sock)
    sender.join()
    assert got == theirs


def turns(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Small pieces in turn; every piece is awaited."""
    for _ in range(20):
        sock.sendall(mine[:100])
        assert read_exactly(sock, len(theirs[:100])) == theirs[:100]


def reset(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """RST, once both ends are known to be there: before, a proxy may give up without having told the server."""
    assert read_exactly(sock, 1) == b"!"
    reset_on_close(sock)


def be_reset(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """The other's RST, not a FIN."""
    sock.sendall(b"!")
    with pytest.raises(ConnectionResetError):
        read_all(sock)


Part = Callable[[socket.socket, bytes, bytes], None]
# (what the client does, what the server does)
SHAPES: tuple[tuple[Part, Part], ...] = (
    (speak_first, listen_first),
    (listen_first, speak_first),
    (both_at_once, both_at_once),
    (turns, turns),
    (reset, be_reset),
    (be_reset, reset),
)


def script(seed: int) -> tuple[tuple[Part, Part], bytes, bytes]:
    """What both ends of connection `seed` know: the shape, the client's bytes, the server's."""
    dice = random.Random(seed)
    sizes = [min(LARGEST, int(10 ** dice.uniform(0, 6.1))) if dice.random() < 0.9 else 0 for _ in range(2)]
    return dice.choice(SHAPES), dice.randbytes(sizes[0]), dice.randbytes(sizes[1])


def serve(listener: socket.socket, failures: list[BaseException]) -> None:
    """Accept COUNT connections and play the server in each."""

    def play(sock: socket.socket) -> None:
        try:
            with sock:
                sock.settimeout(30)
                (seed,) = SEED.unpack(read_exactly(sock, SEED.size))
                (_, part), theirs, mine = script(seed)
                part(sock, mine, theirs)
        except BaseException as error:  # noqa: BLE001 - the test's own thread reports it
            failures.append(error)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(COUNT):
            pool.submit(play, listener.accept()[0])


@pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])
def test_every_shape_of_connection_survives(world: Pods, net: dict[str, str]) -> None:
    failures: list[BaseException] = []

    def play(seed: int) -> None:
        (part, _), mine, theirs = script(seed)
        with client(world.pod, net["far"], 7300) as sock:
            sock.settimeout(30)
            sock.sendall(SEED.pack(seed))
            part(sock, mine, theirs)

    family = "v6" if ":" in net["far"] else "v4"
    with proxy(world.pod, listeners=[("outbound", "redirect", OUTBOUND, family)]) as running:
        with listen(world.far, net["far"], 7300) as server:
            server.listen(512)
            server.settimeout(60)
            serving = threading.Thread(target=serve, args=(server, failures))
            serving.start()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                errors = [error for error in pool.map(lambda seed: failure(play, seed), range(COUNT)) if error]
            serving.join(60)
        assert (errors, failures) == ([], [])
        running.stop()
    assert running.counters["connections_opened"] == running.counters["connections_closed"] == COUNT
    assert [flow for flow in running.flows if flow["uid"] == PROXY_UID] == []


def failure(play: Callable[[int], None], seed: int) -> str | None:
    """What went wrong in connection `seed`."""
    try:
        play(seed)
    except (OSError, AssertionError) as error:
        return f"{seed}: {script(seed)[0][0].__name__}: {error!r}"[:200]
    return None
