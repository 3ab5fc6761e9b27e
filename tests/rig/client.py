"""ask(): one connection or datagram from a pod, as a user, and who answered it."""

from __future__ import annotations

import errno
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.rig.net import Pod
from tests.rig.sockets import identity, name_of, open_socket, split

APP_UID = 1000
PROXY_UID = 1337
ANSWER_S = 3.0  # far above what a loaded machine takes; reached only by what is lost
LOST_S = 0.25  # how long to wait for what should not come
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
FAILURES = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EPERM: "lost",  # a dropped packet, where the kernel tells its sender
    errno.ETIMEDOUT: "lost",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """Which server answered ("refused", "lost" ... when none did) and what it took for the original destination."""

    by: str
    original_dst: str = ""
    peer: str = field(default="", compare=False)
    local: str = field(default="", compare=False)
    source: str = field(default="", compare=False)  # the asking socket's own address


LOST, REFUSED = Answer("lost"), Answer("refused")


@dataclass(frozen=True, slots=True)
class Question:
    """A connection to make, or a datagram to send, and by whom."""

    pod: Pod
    to: str
    proto: str = "tcp"
    uid: int = APP_UID
    gid: int | None = None  # None: the same number as uid
    mark: int = 0
    source: str | None = None
    transparent: bool = False


def ask(pod: Pod, to: str, *, timeout_s: float = ANSWER_S, **how: object) -> Answer:
    """Connect (or send a datagram) to `to`; the answer. `how` are Question's fields."""
    return ask_all([Question(pod, to, **how)], timeout_s=timeout_s)[0]  # type: ignore[arg-type]


def ask_all(questions: Sequence[Question], *, timeout_s: float = ANSWER_S) -> list[Answer]:
    """All at once: the answers in order."""
    answers: dict[int, Answer] = {}
    with selectors.DefaultSelector() as selector:
        for number, question in enumerate(questions):
            sock = _open(question)
            try:
                _send(sock, question)
            except OSError as error:
                answers[number] = _failed(error)
                sock.close()
            else:
                selector.register(sock, selectors.EVENT_READ, number)
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(questions) and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                answers[key.data] = _read(key.fileobj)  # type: ignore[arg-type]
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
        for key in list(selector.get_map().values()):
            answers[key.data] = LOST
            key.fileobj.close()  # type: ignore[union-attr]
    return [answers[number] for number in range(len(questions))]


def _gid(question: Question) -> int:
    return question.uid if question.gid is None else question.gid


def _open(question: Question) -> socket.socket:
    sock = open_socket(
        question.pod,
        KINDS[question.proto],
        question.to,
        uid=question.uid,
        gid=_gid(question),
        mark=question.mark,
        source=question.source,
        transparent=question.transparent,
    )
    sock.setblocking(False)
    return sock


def _send(sock: socket.socket, question: Question) -> None:
    # Connected UDP: an answer from any other address than the one asked would not arrive.
    try:
        with identity(question.uid, _gid(question)):
            sock.connect(split(question.to))
    except BlockingIOError:
        return
    if question.proto == "udp":
        sock.send(b"?")


def _read(sock: socket.socket) -> Answer:
    try:
        received = sock.recv(2048)
        if not received:
            return Answer("closed")
        said = json.loads(received)
        return Answer(said["server"], said["original_dst"], said["peer"], said["local"], name_of(sock.getsockname()))
    except OSError as error:
        return _failed(error)


def _failed(error: OSError) -> Answer:
    return Answer(FAILURES.get(error.errno or 0, str(error)))


@contextmanager
def connected(question: Question) -> Iterator[tuple[socket.socket, Answer]]:
    """A TCP connection that stays open within the block, and the server's first line."""
    with _open(question) as sock:
        sock.settimeout(ANSWER_S)
        with identity(question.uid, _gid(question)):
            sock.connect(split(question.to))
        yield sock, _read(sock)


def wait_until(claim: Callable[[], bool], what: str, deadline_s: float = 5.0) -> None:
    """Return as soon as `claim` holds; fail, naming `what`, when it doesn't in time."""
    end = time.monotonic() + deadline_s
    while not claim():
        assert time.monotonic() < end, f"not in {deadline_s} s: {what}"
        time.sleep(0.002)
