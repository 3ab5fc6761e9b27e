"""The agent's socket: takes requests from shims, has each carried out in a thread, answers. What is done is `plugin`'s.

Only root may ask (SO_PEERCRED), and the socket's own directory lets nobody else near it.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from cni import wire

Answer: TypeAlias = tuple[int, bytes, bytes]

# The directory beside the socket in which the agent keeps what it remembers.
ATTACHMENTS = "attachments"
BACKLOG = 512
# Requests carried out at once; the others wait in the listening queue. A slow one waits for a program, or for the API.
AT_ONCE = 32
# A shim that says nothing more must not hold a place: it sends all it has at once.
RECEIVE_S = 5.0
PEER_CREDENTIALS = struct.Struct("=iII")  # struct ucred, linux/socket.h: pid, uid, gid
DESCRIPTORS = struct.Struct("=i")


class AgentError(Exception):
    """The agent cannot start; the text says why."""


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came, and the pod's network namespace; -1 where none was sent."""

    environment: dict[str, str]
    stdin: bytes
    netns: int


Handler: TypeAlias = Callable[[Received], Answer]
Refused: TypeAlias = Callable[[str], None]  # told why somebody was not answered


def listen(path: str) -> socket.socket:
    """The listening socket at `path`, root's alone, in the place of one that is there; a directory of its own is root's, too.

    A new agent takes over from an old one so: whoever connects from now on reaches the new one, and what the old one has
    accepted, it finishes. Raises AgentError.
    """
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        _close_to_others(folder, os.path.basename(path))
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AgentError(f"{path} is there already and is no socket")
        new = f"{path}.{os.getpid()}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Bound beside and renamed: at no moment is there no socket at `path`.
        sock.bind(new)
        os.chmod(new, 0o600)
        sock.listen(BACKLOG)
        os.rename(new, path)
    except OSError as error:
        raise AgentError(f"listening at {path}: {error.strerror}") from error
    return sock


def _close_to_others(folder: str, socket_name: str) -> None:
    # A directory that others use, like /run, must stay as it is: the socket's own mode keeps them out.
    ours = all(name.startswith(socket_name) or name == ATTACHMENTS for name in os.listdir(folder))
    if ours:
        os.chmod(folder, 0o700)
    elif os.stat(folder).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise AgentError(f"{folder}: others may write there, and things of theirs are in it: give the socket its own directory")


class Server:
    """Serves one listening socket until `stop()`."""

    def __init__(self, sock: socket.socket, handler: Handler, on_refused: Refused = lambda _reason: None) -> None:
        self._sock = sock
        self._handler = handler
        self._on_refused = on_refused
        self._places = threading.BoundedSemaphore(AT_ONCE)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Accept until `stop()`; then wait for what was begun."""
        for _ in range(AT_ONCE):
            self._start()
        self._stopping.wait()
        for _ in range(AT_ONCE):
            self._places.acquire()

    def _start(self) -> None:
        threading.Thread(target=self._work, name="request", daemon=True).start()

    def _work(self) -> None:
        # Each thread accepts for itself: a request waits for no thread to be made, nor for one to be told.
        try:
            while not self._stopping.is_set():
                with self._places:
                    self._accept()
        except BaseException:
            self._start()  # a bug costs no place
            raise

    def _accept(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except OSError:  # shut down by stop(), or out of descriptors
            self._stopping.wait(0.1)
            return
        self._serve(connection)

    def stop(self) -> None:
        """Accept no more. What waits in the queue is closed unanswered, and the shim asks whoever listens then."""
        self._stopping.set()
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(RECEIVE_S)
                self._answer(connection)
        except (OSError, wire.WireError) as error:
            self._on_refused(str(error))

    def _answer(self, connection: socket.socket) -> None:
        pid, uid, _ = PEER_CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        )
        if uid != 0:
            raise wire.WireError(f"process {pid} of uid {uid} asked; only root may")
        received = receive(connection)
        if received is None:
            return
        try:
            status, stdout, stderr = self._handler(received)
        finally:
            if received.netns >= 0:
                os.close(received.netns)
        connection.sendall(wire.answer(status, stdout, stderr))


def receive(connection: socket.socket) -> Received | None:
    """One request. None: closed without a byte, as the installer does, which looks whether somebody listens.

    Raises OSError or WireError; then no descriptor is left open.
    """
    space = socket.CMSG_SPACE(DESCRIPTORS.size)
    head, ancillary, _, _ = connection.recvmsg(wire.REQUEST_HEAD, space)
    descriptors = [
        number
        for level, kind, content in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (number,) in DESCRIPTORS.iter_unpack(content[: len(content) // DESCRIPTORS.size * DESCRIPTORS.size])
    ]
    if not head:
        return None
    try:
        if len(head) < wire.REQUEST_HEAD:
            head += _rest(connection, wire.REQUEST_HEAD - len(head))
        environment, stdin = wire.read_request(head, _rest(connection, wire.request_size(head)))
    except BaseException:
        for number in descriptors:
            os.close(number)
        raise
    for number in descriptors:
        os.set_inheritable(number, False)
    return Received(environment, stdin, descriptors[0] if descriptors else -1)


def _rest(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(size)
        if not part:
            raise wire.WireError("the request ended early")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
