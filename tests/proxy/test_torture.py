"""Thousands of connections of every shape at once: what each end sees through the proxy is what the other did."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from interceptor import capture
from interceptor.config import Config
from interceptor.sockets import reset_on_close
from tests.proxy.pods import OUTBOUND, PROXY_UID, V4, V6, Pods, client, listen, pods, proxy

pytestmark = pytest.mark.netns
COUNT = 10_000
SHORT_COUNT = 300
AT_ONCE = 64
# sendall() of 16 MB to one who reads 4 KB at a time, among 128 threads of one Python: 30 s pass on a busy machine.
HANG_S = 120
SEED = struct.Struct("!Q")
# Most are small, one in a hundred is up to the largest.
LARGE, LARGEST = 256 * 1024, 16 << 20
RELAYS = ["packet", "splice", "copy"]
NETS = pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])


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


def read_into(got: bytearray, sock: socket.socket) -> None:
    """Everything until FIN, into `got`: what came before a reset is kept."""
    while chunk := sock.recv(1 << 16):
        got += chunk


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


def reset_behind_bytes(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """A few bytes that must arrive, then RST."""
    assert read_exactly(sock, 1) == b"!"
    sock.sendall(mine[:1000])
    reset_on_close(sock)


def be_reset_behind_bytes(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """The other's bytes, then its RST."""
    sock.sendall(b"!")
    got = bytearray()
    with pytest.raises(ConnectionResetError):
        read_into(got, sock)
    assert bytes(got) == theirs[:1000]


def read_slowly(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """FIN at once, then all of theirs through a small window, with pauses."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.shutdown(socket.SHUT_WR)
    got = bytearray()
    while chunk := sock.recv(32 * 1024):
        got += chunk
        time.sleep(0.0002)
    assert bytes(got) == theirs


def write_to_slow(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """All of mine to one who reads slowly and says nothing."""
    sock.sendall(mine)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b""


def idle_then_speak(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """A pause, mine, a pause, FIN, theirs."""
    time.sleep(0.05)
    sock.sendall(mine)
    time.sleep(0.05)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == theirs


def leave(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Nothing at all, FIN both ways."""
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b""


Part = Callable[[socket.socket, bytes, bytes], None]
# (what the client does, what the server does)
SHAPES: tuple[tuple[Part, Part], ...] = (
    (speak_first, listen_first),
    (listen_first, speak_first),
    (both_at_once, both_at_once),
    (turns, turns),
    (reset, be_reset),
    (be_reset, reset),
    (reset_behind_bytes, be_reset_behind_bytes),
    (be_reset_behind_bytes, reset_behind_bytes),
    (read_slowly, write_to_slow),
    (write_to_slow, read_slowly),
    (idle_then_speak, listen_first),
    (speak_first, idle_then_speak),
    (leave, leave),
)


def script(seed: int) -> tuple[tuple[Part, Part], bytes, bytes]:
    """What both ends of connection `seed` know: the shape, the client's bytes, the server's."""
    dice = random.Random(seed)
    largest = LARGEST if seed % 100 == 0 else LARGE
    sizes = [int(largest ** dice.random()) if dice.random() < 0.9 else 0 for _ in range(2)]
    if seed % 100 == 0:
        sizes[seed // 100 % 2] = largest
    return SHAPES[seed % len(SHAPES)], dice.randbytes(sizes[0]), dice.randbytes(sizes[1])


def serve(listener: socket.socket, count: int, failures: list[str]) -> None:
    """Accept `count` connections and play the server in each."""

    def play(sock: socket.socket) -> None:
        seed = -1
        try:
            with sock:
                sock.settimeout(HANG_S)
                (seed,) = SEED.unpack(read_exactly(sock, SEED.size))
                (_, part), theirs, mine = script(seed)
                part(sock, mine, theirs)
        except BaseException as error:  # noqa: BLE001 - the test's own thread reports it
            failures.append(f"server {seed}: {script(seed)[0][1].__name__}: {error!r}"[:200])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(count):
            pool.submit(play, listener.accept()[0])


def converse(world: Pods, net: dict[str, str], relay: str, count: int) -> None:
    """`count` connections, AT_ONCE at a time; nothing may differ, hang or leak."""
    failures: list[str] = []

    def play(seed: int) -> None:
        (part, _), mine, theirs = script(seed)
        try:
            with client(world.pod, net["far"], 7300) as sock:
                sock.settimeout(HANG_S)
                sock.sendall(SEED.pack(seed))
                part(sock, mine, theirs)
        except (OSError, AssertionError) as error:
            failures.append(f"client {seed}: {part.__name__}: {error!r}"[:200])

    family = "v6" if ":" in net["far"] else "v4"
    with proxy(world.pod, listeners=[("outbound", "redirect", OUTBOUND, family)], relay=relay) as running:
        before = descriptors(running.process.pid)
        with listen(world.far, net["far"], 7300) as server:
            server.listen(512)
            server.settimeout(HANG_S)
            serving = threading.Thread(target=serve, args=(server, count, failures))
            serving.start()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(play, range(count)):
                    pass
            serving.join(HANG_S)
        assert failures == []
        wait_until_closed(running.process.pid, before)
        running.stop()
    assert running.counters["connections_opened"] == running.counters["connections_closed"] == count
    assert [flow for flow in running.flows if flow["uid"] == PROXY_UID] == []
    assert {flow["relay"] for flow in running.flows} == {relay}


@pytest.mark.slow
@NETS
@pytest.mark.parametrize("relay", RELAYS)
def test_every_shape_of_connection_survives(world: Pods, relay: str, net: dict[str, str]) -> None:
    converse(world, net, relay, SHORT_COUNT)


@pytest.mark.torture
@NETS
@pytest.mark.parametrize("relay", RELAYS)
def test_thousands_of_every_shape_survive(world: Pods, relay: str, net: dict[str, str]) -> None:
    converse(world, net, relay, COUNT)


def descriptors(pid: int) -> list[str]:
    """What a process has open, without the pipes, which the splice relay keeps."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:
            continue  # closed since it was listed
        if not target.startswith("pipe:"):
            found.append(target)
    return sorted(found)


def wait_until_closed(pid: int, before: list[str]) -> None:
    """Until a process has open what it had before."""
    deadline = time.monotonic() + 10
    while (now := descriptors(pid)) != before:
        assert time.monotonic() < deadline, set(now) - set(before)
        time.sleep(0.01)
