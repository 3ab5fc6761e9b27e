"""Conversations of every shape between two namespaces."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from interceptor.sockets import reset_on_close
from tests.proxy.pods import client, listen

DEADLINE_S = 60.0
SEED = struct.Struct("!Q")
LARGEST = 16 << 20


def read_all(sock: socket.socket) -> bytes:
    """Everything until FIN. A reset raises."""
    return b"".join(iter(lambda: sock.recv(1 << 18), b""))


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


def listen_slowly(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """All of theirs, with a small buffer and pauses, then all of mine, FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    got = bytearray()
    while chunk := sock.recv(1 << 16):
        got += chunk
        time.sleep(0.0005)  # the reader is slow: that is what is tested
    assert bytes(got) == theirs
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


def idle_then_speak(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Nothing for a while, then all of mine, FIN, then all of theirs."""
    time.sleep(0.3)  # silence is what is tested
    speak_first(sock, mine, theirs)


def reset(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """RST, once both ends are known to be there."""
    assert read_exactly(sock, 1) == b"!"
    reset_on_close(sock)


def be_reset(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """The other's RST, not a FIN."""
    sock.sendall(b"!")
    try:
        read_all(sock)
    except ConnectionResetError:
        return
    raise AssertionError("FIN, where the other end has reset")


Part = Callable[[socket.socket, bytes, bytes], None]
# (what the client does, what the server does)
SHAPES: tuple[tuple[Part, Part], ...] = (
    (speak_first, listen_first),
    (listen_first, speak_first),
    (both_at_once, both_at_once),
    (turns, turns),
    (reset, be_reset),
    (be_reset, reset),
    (speak_first, listen_slowly),
    (listen_slowly, speak_first),
    (idle_then_speak, listen_first),
)


NO_RESETS = tuple(shape for shape in SHAPES if reset not in shape)


def script(seed: int, shapes: tuple[tuple[Part, Part], ...] = SHAPES) -> tuple[tuple[Part, Part], bytes, bytes]:
    """What both ends of connection `seed` know: the shape, the client's bytes, the server's."""
    dice = random.Random(seed)
    shape = dice.choice(shapes)
    largest = 5.0 if listen_slowly in shape else 6.1 if dice.random() < 0.98 else 7.2
    sizes = [min(LARGEST, int(10 ** dice.uniform(0, largest))) if dice.random() < 0.9 else 0 for _ in range(2)]
    return shape, dice.randbytes(sizes[0]), dice.randbytes(sizes[1])


def converse(
    client_at: str, server_at: str, ip: str, port: int, count: int, at_once: int = 64, *, without_resets: bool = False
) -> list[str]:
    """`count` conversations of all shapes from one namespace to the other; what went wrong, at either end."""
    failures: list[str] = []
    shapes = NO_RESETS if without_resets else SHAPES

    def serve_one(sock: socket.socket) -> None:
        seed = -1
        try:
            with sock:
                sock.settimeout(DEADLINE_S)
                (seed,) = SEED.unpack(read_exactly(sock, SEED.size))
                (_, part), theirs, mine = script(seed, shapes)
                part(sock, mine, theirs)
        except Exception as error:  # noqa: BLE001 - the test's own thread reports it
            failures.append(f"server {seed}: {error!r}"[:300])

    def serve(listener: socket.socket) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for _ in range(count):
                try:
                    pool.submit(serve_one, listener.accept()[0])
                except TimeoutError:
                    failures.append("server: accepted fewer")
                    return

    def play(seed: int) -> None:
        (part, _), mine, theirs = script(seed, shapes)
        try:
            with client(client_at, ip, port) as sock:
                sock.settimeout(DEADLINE_S)
                sock.sendall(SEED.pack(seed))
                part(sock, mine, theirs)
        except Exception as error:  # noqa: BLE001 - as above
            failures.append(f"client {seed} {part.__name__}: {error!r}"[:300])

    with listen(server_at, ip, port) as server:
        server.listen(512)
        server.settimeout(DEADLINE_S)
        serving = threading.Thread(target=serve, args=(server,))
        serving.start()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(play, range(count)))
        serving.join(DEADLINE_S)
    return failures
