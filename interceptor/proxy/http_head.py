"""Read the head of an HTTP/1 request out of bytes that may be cut anywhere. No I/O; no bodies, responses or HTTP/2.

For a log and an admin port, not for routing: what this takes for a request line, a server may still refuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# RFC 9110 5.6.2: a token, which a method is. The longest registered one has 17 characters (IANA: UPDATEREDIRECTREF).
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,24}) ([\x21-\x7e]+) HTTP/1\.([01])")
# What may still become one.
_BEGINNING = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{0,24}|[!#$%&'*+.^_`|~0-9A-Za-z-]{1,24} [\x21-\x7e]*(?: [HTP/1.0]{0,8}\r?)?"
)
# RFC 3986's reg-name, an IPv4 address or an IPv6 one in brackets, and a port. 253 is what DNS allows, and 6 for ":65535".
_HOST = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]{1,253}|\[[0-9A-Fa-f:.]{2,45}(?:%25[A-Za-z0-9._~-]{1,15})?\])(?::[0-9]{0,5})?"
)
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#]*)")


class NotHttp(Exception):
    """These bytes begin no HTTP/1 request, whatever may follow."""


@dataclass(frozen=True, slots=True)
class RequestLine:
    """The first line of a request; `end` is where its headers begin."""

    method: str
    target: bytes
    version: tuple[int, int]
    end: int


def request_line(head: bytes) -> RequestLine | None:
    """The request line that `head` begins with; None while it may still become one. Raises NotHttp as soon as it cannot."""
    end = head.find(b"\n")
    if end < 0:
        if not _BEGINNING.fullmatch(head):
            raise NotHttp
        return None
    match = _REQUEST_LINE.fullmatch(head[:end].removesuffix(b"\r"))
    if match is None:
        raise NotHttp
    return RequestLine(match[1].decode("ascii"), match[2], (1, int(match[3])), end + 1)


def is_complete(head: bytes) -> bool:
    """Whether the empty line that ends a head is there."""
    return b"\r\n\r\n" in head or b"\n\n" in head


def host(head: bytes) -> str | None:
    """The host that the request is for: its target's, or the first Host header's, port included.

    None while more of the head is needed; an empty text when the head has no host, or one that no URI may hold.
    Raises NotHttp.
    """
    line = request_line(head)
    if line is None:
        return None
    # RFC 9112 3.2.2: a target in absolute form, and that of CONNECT, goes before the header.
    absolute = _ABSOLUTE.match(line.target)
    if absolute is not None:
        return _valid(absolute[1].rpartition(b"@")[2])
    if line.method == "CONNECT":
        return _valid(line.target)
    start = line.end
    while (end := head.find(b"\n", start)) >= 0:
        name, colon, value = head[start:end].removesuffix(b"\r").partition(b":")
        if not name and not colon:
            return ""
        if name.lower() == b"host":
            return _valid(value.strip(b" \t"))
        start = end + 1
    return None


def _valid(value: bytes) -> str:
    text = value.decode("ascii", "replace")
    return text if _HOST.fullmatch(text) else ""
