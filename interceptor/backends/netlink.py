"""Talk raw netlink: build messages, send, collect the answers. Knows no subsystem's messages.

For what must cost microseconds on every init: `import pyroute2` takes 180–250 ms. Layout: linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from _thread import _local  # threading.local; importing that module takes 1 ms
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from interceptor import netns

NETLINK_ROUTE = 0  # linux/netlink.h, to the end of this block
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_REPLACE = 0x100
NLM_F_NONREC = 0x100
NLM_F_EXCL = 0x200
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLMSG_ERROR = 2
NLMSG_DONE = 3
SOL_NETLINK = 270
SO_SNDBUFFORCE = 32  # asm-generic/socket.h; beyond the limit, for CAP_NET_ADMIN
NETLINK_GET_STRICT_CHK = 12

# What this process or the host is short of: says nothing of what the kernel has or holds.
SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
# Above the 32 KiB that the kernel puts into one datagram of a dump; below the 128 KiB from which malloc asks the kernel.
_RECEIVE_SIZE = 1 << 16
_SEND_SIZE = 1 << 16  # below what any kernel lets wait in a socket by itself (net.core.wmem_default: 208 KiB)
_ATTEMPTS = 8  # of a dump that changes underneath; each is complete in itself, so two are almost always enough


@dataclass(frozen=True, slots=True)
class Message:
    """One request; `kind` is nlmsg_type, `payload` what follows the header."""

    kind: int
    payload: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """A transaction's bytes; `last`: the number of the message that is acknowledged, `kind`: its nlmsg_type."""

    content: bytes
    last: int
    kind: int


class _Interrupted(Exception):
    """The listed objects changed during the dump."""


class _Kept:
    """Sockets of one network namespace that stay open, and what dumps have said since something was changed by them."""

    def __init__(self) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self.dumped: dict[tuple[int, int, bytes], list[bytes]] = {}
        self.sequence = 0
        self.stay = netns.stay()


class _Thread(_local):
    """What is kept, thread by thread."""

    kept: _Kept | None = None


_thread = _Thread()
_close: Callable[[socket.socket], None] = socket.socket.close


def close_by(close: Callable[[socket.socket], None]) -> None:
    """How sockets are closed from now on, by whoever must not wait for it.

    Closing one of NETLINK_NETFILTER waits until what was deleted in its namespace is gone: a grace period of the kernel's.
    """
    global _close  # noqa: PLW0603 - a process decides once
    _close = close


@contextmanager
def kept() -> Iterator[None]:
    """Within the block, in the network namespace where it begins, sockets are used again and nothing is listed twice.

    What others change meanwhile is not seen; what programs of ours change is to be told by forget().
    """
    session = _Kept()
    before, _thread.kept = _thread.kept, session
    try:
        yield
    finally:
        _thread.kept = before
        for sock in session.sockets.values():
            _close(sock)


def _session() -> _Kept | None:
    # In a namespace that was entered within the block nothing is kept: these sockets are another's.
    session = _thread.kept
    return session if session is not None and session.stay is netns.stay() else None


def forget() -> None:
    """All that was listed may have changed."""
    session = _session()
    if session is not None:
        session.dumped.clear()


def _forget(protocol: int, changed: int) -> None:
    session = _session()
    if session is not None:
        for asked in [asked for asked in session.dumped if _concerns(protocol, changed, asked[0], asked[1])]:
            del session.dumped[asked]


def _concerns(protocol: int, changed: int, listed_by: int, listed: int) -> bool:
    # rtnetlink numbers the messages about one kind of object in fours: addresses, routes and ip rules of ours stand alone.
    return protocol == listed_by and (protocol != NETLINK_ROUTE or changed >> 2 == listed >> 2)


def dump(protocol: int, kind: int, payload: bytes) -> list[bytes]:
    """The payloads of all objects that a dump request lists. Raises OSError with the kernel's errno."""
    session = _session()
    if session is None:
        return _dump(protocol, kind, payload)
    asked = (protocol, kind, payload)
    if asked not in session.dumped:
        session.dumped[asked] = _dump(protocol, kind, payload)
    return session.dumped[asked]


def _dump(protocol: int, kind: int, payload: bytes) -> list[bytes]:
    message = Message(kind, payload, NLM_F_DUMP)
    for _ in range(_ATTEMPTS):
        with suppress(_Interrupted):
            return request(protocol, [message])
    raise OSError(f"netlink dump {kind}: what it lists changed {_ATTEMPTS} times meanwhile")


def request(protocol: int, messages: Sequence[Message]) -> list[bytes]:
    """Send `messages` one after the other, each acknowledged; the payloads of the answers.

    Raises OSError with the kernel's errno at the first refusal.
    """
    answers: list[bytes] = []
    with _connected(protocol, len(messages)) as (sock, first):
        for sequence, message in enumerate(messages, start=first):
            if message.flags & NLM_F_DUMP == NLM_F_DUMP:
                acknowledge = 0
            else:
                acknowledge = NLM_F_ACK
                _forget(protocol, message.kind)
            sock.send(_packed(message, sequence, NLM_F_REQUEST | acknowledge))
            answers += _answers(sock, sequence)
    return answers


def batch(begin: Message, messages: Sequence[Message], end: Message) -> Batch:
    """`messages` as one nfnetlink batch, which may be sent any number of times."""
    *most, last = messages
    # Refusals come unasked; one acknowledgement a message could be more than the socket's buffer holds.
    parts = [_packed(begin, 0, NLM_F_REQUEST)]
    parts += [_packed(message, sequence, NLM_F_REQUEST) for sequence, message in enumerate(most, start=1)]
    parts += [_packed(last, len(messages), NLM_F_REQUEST | NLM_F_ACK), _packed(end, 0, NLM_F_REQUEST)]
    return Batch(b"".join(parts), len(messages), last.kind)


def transaction(protocol: int, sent: Batch) -> None:
    """Send a batch: all of it or none takes effect. Raises OSError with the first refusal's errno."""
    _forget(protocol, sent.kind)
    # Whatever was asked before at this socket has been answered: the batch's own numbers tell its answers.
    with _connected(protocol, 0) as (sock, _):
        if len(sent.content) > _SEND_SIZE:
            with suppress(OSError):  # in a user namespace; what fits all the same is sent
                sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * len(sent.content))
        sock.send(sent.content)
        _answers(sock, sent.last)


@contextmanager
def _connected(protocol: int, messages: int) -> Iterator[tuple[socket.socket, int]]:
    """A socket, and the number of the first of so many messages."""
    session = _session()
    if session is None:
        with _opened(protocol) as sock:
            yield sock, 1
        return
    if protocol not in session.sockets:
        session.sockets[protocol] = _opened(protocol)
    first = session.sequence + 1
    session.sequence += messages
    try:
        yield session.sockets[protocol], first
    except BaseException:
        # Answers that nobody has read may be in it.
        _close(session.sockets.pop(protocol))
        raise


def _opened(protocol: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.bind((0, 0))
        # Before Linux 4.20 dumps are not filtered; callers filter again.
        with suppress(OSError):
            sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
    except OSError:
        sock.close()
        raise
    return sock


def _packed(message: Message, sequence: int, flags: int) -> bytes:
    length = _HEADER.size + len(message.payload)
    return _HEADER.pack(length, message.kind, message.flags | flags, sequence, 0) + message.payload + bytes(-length % 4)


def _answers(sock: socket.socket, sequence: int) -> list[bytes]:
    found: list[bytes] = []
    interrupted = False
    while True:
        for kind, flags, answered, payload in _messages(sock.recv(_RECEIVE_SIZE)):
            # A refused batch is answered under the sequence number of what was refused.
            if kind == NLMSG_ERROR:
                _raise_for(payload)
            if answered != sequence:
                continue
            interrupted |= bool(flags & NLM_F_DUMP_INTR)
            if kind == NLMSG_DONE:
                _raise_for(payload)
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                if interrupted:
                    raise _Interrupted
                return found
            found.append(payload)


def _messages(received: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(received):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(received, position)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, received[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def _raise_for(payload: bytes) -> None:
    status: int = struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
    if status < 0:
        raise OSError(-status, os.strerror(-status))
