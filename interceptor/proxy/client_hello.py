"""Read the names in a TLS ClientHello out of bytes that may be cut anywhere. No I/O, no cryptography, no judgement of the rest.

Sources: RFC 8446 4.1.2 and 5.1 (the message, the records), RFC 6066 3 (server_name), RFC 7301 3.1 (ALPN), RFC 8701 (GREASE),
RFC 9849 (encrypted ClientHello, whose outer name this is).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

HANDSHAKE = 22  # RFC 8446 B.1, ContentType
CLIENT_HELLO = 1  # RFC 8446 B.3, HandshakeType
SERVER_NAME, ALPN, ENCRYPTED_CLIENT_HELLO = 0, 16, 0xFE0D  # IANA, TLS ExtensionType Values
RECORD_SIZE = 1 << 14  # RFC 8446 5.1
# Real ones take 200 bytes to 2 KB (post-quantum key shares); what is larger is not worth reading.
HELLO_SIZE = 1 << 14
# A name that DNS could hold; what else a client writes is not a name.
_NAME = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?")
# Browsers offer two protocols; a list that is longer is cut.
MAX_PROTOCOLS = 8
_EXTENSION = struct.Struct("!HH")
_WANTED = frozenset({SERVER_NAME, ALPN, ENCRYPTED_CLIENT_HELLO})


class NotTls(Exception):
    """These bytes begin no ClientHello that is worth reading, whatever may follow."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What was found. `is_encrypted`: there is an encrypted ClientHello inside, and `sni` names only the server before it."""

    sni: str | None
    alpn: tuple[str, ...]
    is_encrypted: bool


class _Short(Exception):
    """A vector that ends before its content does."""


class _Reader:
    """Takes fields off the front of `content`, and nothing from beyond its end."""

    __slots__ = ("_at", "_content")

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._content)

    def take(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + size]
        if len(taken) < size:
            raise _Short
        self._at += size
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_size: int) -> bytes:
        return self.take(self.number(length_size))


def client_hello(stream: bytes) -> ClientHello | None:
    """The ClientHello that `stream` begins with; None while it may still become one. Raises NotTls as soon as it cannot."""
    message = _message(stream)
    if message is None:
        return None
    try:
        return _parse(_Reader(message))
    except _Short:
        raise NotTls from None


def _message(stream: bytes) -> bytes | None:
    """The body of the handshake message, put together from its records."""
    gathered = b""
    at = 0
    while True:
        header = stream[at : at + 5]
        _check_record(header)
        if len(header) < 5:
            return None
        size = _size(header)
        gathered += stream[at + 5 : at + 5 + size]
        if gathered and gathered[0] != CLIENT_HELLO:
            raise NotTls
        if len(gathered) >= 4:
            wanted = int.from_bytes(gathered[1:4], "big")
            if wanted > HELLO_SIZE:
                raise NotTls
            if len(gathered) >= 4 + wanted:
                return gathered[4 : 4 + wanted]
        at += 5 + size


def _check_record(header: bytes) -> None:
    if len(header) == 5 and header[0] == HANDSHAKE and header[1] == 3 and header[2] <= 4 and 0 < _size(header) <= RECORD_SIZE:
        return
    # Byte by byte, so that a protocol that is not TLS is known for it by its first byte. 3, 0 to 3, 4: SSL 3.0 to TLS 1.3.
    if header[:1] not in (b"", bytes([HANDSHAKE])) or header[1:2] not in (b"", b"\x03") or header[2:3] > b"\x04":
        raise NotTls
    if len(header) == 5:
        raise NotTls


def _size(header: bytes) -> int:
    return header[3] << 8 | header[4]


def _parse(message: _Reader) -> ClientHello:
    message.take(2 + 32)  # legacy_version, random
    message.vector(1)  # legacy_session_id
    message.vector(2)  # cipher_suites
    message.vector(1)  # legacy_compression_methods
    sni: str | None = None
    alpn: tuple[str, ...] = ()
    is_encrypted = False
    # SSL 3.0 and old TLS clients end here.
    for kind, content in _extensions(message.vector(2) if message else b""):
        if kind == SERVER_NAME and sni is None:
            sni = _server_name(_Reader(content))
        elif kind == ALPN and not alpn:
            alpn = tuple(_protocols(_Reader(content)))
        elif kind == ENCRYPTED_CLIENT_HELLO:
            is_encrypted = True
    return ClientHello(sni, alpn, is_encrypted)


def _extensions(content: bytes) -> Iterator[tuple[int, bytes]]:
    # A dozen in every hello, of which two matter: by hand, for a third of what a _Reader takes.
    at, end = 0, len(content)
    while at < end:
        if at + 4 > end:
            raise _Short
        kind, size = _EXTENSION.unpack_from(content, at)
        at += 4 + size
        if at > end:
            raise _Short
        if kind in _WANTED:
            yield kind, content[at - size : at]


def _server_name(extension: _Reader) -> str | None:
    names = _Reader(extension.vector(2))
    while names:
        kind = names.number(1)
        name = names.vector(2)
        if kind == 0:  # host_name, the only kind there is
            return name.decode("ascii") if _NAME.fullmatch(name) else None
    return None


def _protocols(extension: _Reader) -> Iterator[str]:
    names = _Reader(extension.vector(2))
    for _ in range(MAX_PROTOCOLS):
        if not names:
            return
        name = names.vector(1)
        if not _is_grease(name):
            yield name.decode("ascii", "backslashreplace")


def _is_grease(name: bytes) -> bool:
    return len(name) == 2 and name[0] == name[1] and name[0] & 0x0F == 0x0A
