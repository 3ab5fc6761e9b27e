"""A strict reader of PROXY protocol headers: what a server sees of ours. What the specification lets it refuse, it refuses."""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass

from interceptor.sockets import Address

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V1_SIZE = 107
V1 = re.compile(rb"PROXY (?:TCP([46]) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) ([0-9]{1,5}) ([0-9]{1,5})|UNKNOWN[^\r\n]*)\r\n")


class NotProxyProtocol(Exception):
    """These bytes begin no header, whatever may follow."""


@dataclass(frozen=True, slots=True)
class Header:
    """What it says; no addresses: those of the connection itself count. `size`: the bytes it took."""

    source: Address | None
    destination: Address | None
    size: int
    tlvs: tuple[tuple[int, bytes], ...] = ()


def read(stream: bytes) -> Header | None:
    """The header that `stream` begins with; None while it may still become one. Raises NotProxyProtocol."""
    if stream[:1] == b"P":
        return _read_v1(stream)
    if stream[: len(SIGNATURE)] != SIGNATURE[: len(stream)]:
        raise NotProxyProtocol
    return _read_v2(stream)


def _read_v1(stream: bytes) -> Header | None:
    line = stream[:V1_SIZE]
    end = line.find(b"\r\n")
    if end < 0:
        if len(line) == V1_SIZE or not b"PROXY ".startswith(line[:6]):
            raise NotProxyProtocol
        return None
    match = V1.fullmatch(line[: end + 2])
    if match is None:
        raise NotProxyProtocol
    if match[1] is None:
        return Header(None, None, end + 2)
    source, destination = (_address(int(match[1]), *match.group(index, index + 2)) for index in (2, 3))
    return Header(source, destination, end + 2)


def _address(version: int, host: bytes, port: bytes) -> Address:
    try:
        ip = ipaddress.ip_address(host.decode("ascii"))
    except ValueError:
        raise NotProxyProtocol from None
    if ip.version != version or int(port) > 65535 or port != str(int(port)).encode():
        raise NotProxyProtocol
    return Address(ip, int(port))


def _read_v2(stream: bytes) -> Header | None:
    if len(stream) > 12 and stream[12] not in (0x20, 0x21):
        raise NotProxyProtocol
    if len(stream) < 16:
        return None
    command, family, length = struct.unpack_from("!BBH", stream, 12)
    width = {0x11: 4, 0x21: 16}.get(family, 0)
    if command == 0x21 and (family not in (0x00, 0x11, 0x21) or (width and length < 2 * width + 4)):
        raise NotProxyProtocol
    if len(stream) < 16 + length:
        return None
    content = stream[16 : 16 + length]
    if command == 0x20 or not width:
        return Header(None, None, 16 + length)
    ports = struct.unpack_from("!HH", content, 2 * width)
    ips = (ipaddress.ip_address(content[:width]), ipaddress.ip_address(content[width : 2 * width]))
    return Header(Address(ips[0], ports[0]), Address(ips[1], ports[1]), 16 + length, _tlvs(content[2 * width + 4 :]))


def _tlvs(content: bytes) -> tuple[tuple[int, bytes], ...]:
    found = []
    while content:
        if len(content) < 3:
            raise NotProxyProtocol
        kind, length = struct.unpack_from("!BH", content)
        if len(content) < 3 + length:
            raise NotProxyProtocol
        found.append((kind, content[3 : 3 + length]))
        content = content[3 + length :]
    return tuple(found)
