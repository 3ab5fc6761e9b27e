"""Connections of every shape; each end says what it saw that it should not have. A program, once server and once client.

    python -m bench.torture server HOST PORT COUNT SEED
    python -m bench.torture client HOST PORT COUNT SEED

Both ends derive a connection's script (who sends how much, who ends how) from its number. One JSON document a bad connection on
stdout: {"number": 7, "shape": "upload", "wrong": "short, yet a clean end"}.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from interceptor.sockets import reset_on_close

AT_ONCE = 48
NUMBER = struct.Struct("!Q")
LARGEST_EXPONENT = 6.9  # sizes are 10^x bytes, x even up to this: most are small, the largest 8 MB
EMPTY_SHARE = 0.1
TURNS, PIECE = 20, 100
SLOW_BUFFER, SLOW_PAUSE_S, SLOW_FIRST_S = 8192, 0.0005, 0.05
HANG_S = 20.0
# All that a client sends before it resets; the server may get any part of it.
BEFORE_RESET = 200_000


class Wrong(Exception):
    """What an end saw that it should not have; the text is the class of the fault."""


SHORT, OTHER_BYTES = "short, yet a clean end", "other bytes"
NO_RESET, RESET, HUNG, REFUSED = "reset became a clean end", "reset for no reason", "hung", "not connected"


def read_all(sock: socket.socket, wanted: bytes, *, slowly: bool = False) -> None:
    """Exactly `wanted`, then FIN."""
    got = bytearray()
    if slowly:
        time.sleep(SLOW_FIRST_S)
    while chunk := sock.recv(SLOW_BUFFER if slowly else 1 << 16):
        got += chunk
        if slowly:
            time.sleep(SLOW_PAUSE_S)
    if got != wanted:
        raise Wrong(SHORT if wanted.startswith(got) else OTHER_BYTES)


def read_piece(sock: socket.socket, wanted: bytes) -> None:
    """Exactly `wanted`, with more to come."""
    got = bytearray()
    while len(got) < len(wanted) and (chunk := sock.recv(len(wanted) - len(got))):
        got += chunk
    if got != wanted:
        raise Wrong(SHORT if wanted.startswith(got) else OTHER_BYTES)


def send_all(sock: socket.socket, mine: bytes) -> None:
    """All of it, then FIN."""
    sock.sendall(mine)
    sock.shutdown(socket.SHUT_WR)


def speak_first(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Mine, FIN, then theirs."""
    send_all(sock, mine)
    read_all(sock, theirs)


def listen_first(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Theirs, then mine, FIN."""
    read_all(sock, theirs)
    send_all(sock, mine)


def listen_first_slowly(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Theirs at a slow pace, then mine."""
    read_all(sock, theirs, slowly=True)
    send_all(sock, mine)


def speak_first_read_slowly(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Mine and FIN at once, then theirs, slowly."""
    send_all(sock, mine)
    read_all(sock, theirs, slowly=True)


def both_at_once(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Mine and theirs at the same time."""
    failed: list[OSError] = []

    def send() -> None:
        try:
            send_all(sock, mine)
        except OSError as error:
            failed.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        read_all(sock, theirs)
    finally:
        sender.join()
    if failed:
        raise failed[0]


def turns(sock: socket.socket, mine: bytes, theirs: bytes) -> None:
    """Small pieces in turn; every piece is awaited."""
    for _ in range(TURNS):
        sock.sendall(mine[:PIECE])
        read_piece(sock, theirs[:PIECE])


def close_at_once(_sock: socket.socket, _mine: bytes, _theirs: bytes) -> None:
    """Nothing at all, and FIN."""


def see_nothing(sock: socket.socket, _mine: bytes, _theirs: bytes) -> None:
    """Only FIN."""
    read_all(sock, b"")


def reset(sock: socket.socket, mine: bytes, _theirs: bytes) -> None:
    """RST in the middle, once the other end is known to be there."""
    read_piece(sock, b"!")
    sock.sendall(mine[:BEFORE_RESET])
    reset_on_close(sock)


def be_reset(sock: socket.socket, _mine: bytes, _theirs: bytes) -> None:
    """The other's RST, whatever came before it."""
    sock.sendall(b"!")
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return
    raise Wrong(NO_RESET)


Part: TypeAlias = Callable[[socket.socket, bytes, bytes], None]
# name -> (what the client does, what the server does)
SHAPES: dict[str, tuple[Part, Part]] = {
    "upload, answer": (speak_first, listen_first),
    "download, answer": (listen_first, speak_first),
    "upload to a slow server": (speak_first, listen_first_slowly),
    "download by a slow client": (listen_first_slowly, speak_first),
    "both at once": (both_at_once, both_at_once),
    "both at once, slow server that ends first": (both_at_once, speak_first_read_slowly),
    "in turns": (turns, turns),
    "closed at once": (close_at_once, see_nothing),
    "reset by the client": (reset, be_reset),
    "reset by the server": (be_reset, reset),
}


def script(seed: int, number: int) -> tuple[str, bytes, bytes]:
    """The shape of a connection, the client's bytes, the server's."""
    dice = random.Random(seed * 1_000_003 + number)
    shape = dice.choice(list(SHAPES))
    sizes = [0 if dice.random() < EMPTY_SHARE else int(10 ** dice.uniform(0, LARGEST_EXPONENT)) for _ in range(2)]
    return shape, dice.randbytes(sizes[0]), dice.randbytes(sizes[1])


def attempt(number: int, shape: str, play: Callable[[], None]) -> None:
    """Play one end of a connection; print what was wrong."""
    try:
        play()
    except Wrong as error:
        wrong = str(error)
    except TimeoutError:
        wrong = HUNG
    except ConnectionRefusedError:
        wrong = REFUSED
    except (ConnectionResetError, BrokenPipeError):
        wrong = RESET
    else:
        return
    complain(number, shape, wrong)


def complain(number: int, shape: str, wrong: str) -> None:
    """One line on stdout, in one write: threads share it."""
    os.write(1, (json.dumps({"number": number, "shape": shape, "wrong": wrong}) + "\n").encode())


def serve(host: str, port: int, count: int, seed: int) -> None:
    """Accept so many connections and play the server in each."""

    def play(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(HANG_S)
            try:
                (number,) = NUMBER.unpack(sock.recv(NUMBER.size, socket.MSG_WAITALL))
            except (OSError, struct.error):
                complain(-1, "any", "ended before its first byte")
                return
            shape, theirs, mine = script(seed, number)
            attempt(number, shape, lambda: SHAPES[shape][1](sock, mine, theirs))

    with socket.create_server((host, port), family=family(host), backlog=1024) as listener, ThreadPoolExecutor(AT_ONCE) as pool:
        listener.settimeout(2 * HANG_S)
        for _ in range(count):
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                break  # the client has said which ones did not come
            pool.submit(play, accepted)


def ask(host: str, port: int, count: int, seed: int) -> None:
    """Make so many connections, AT_ONCE at a time, and play the client in each."""

    def play(number: int) -> None:
        shape, mine, theirs = script(seed, number)

        def connection() -> None:
            with socket.create_connection((host, port), timeout=HANG_S) as sock:
                sock.sendall(NUMBER.pack(number))
                SHAPES[shape][0](sock, mine, theirs)

        attempt(number, shape, connection)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(play, number) for number in range(count)]:
            done.result()


def family(host: str) -> socket.AddressFamily:
    """The family of an address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    {"server": serve, "client": ask}[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:6]))
