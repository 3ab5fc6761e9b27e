"""Write the PROXY protocol's header, which tells a server whom a forwarded connection is from. No I/O; reads none.

Source: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt; the section numbers are its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Literal, TypeAlias

from interceptor.sockets import Address, IpAddress

Version: TypeAlias = Literal["v1", "v2"]
Tlv: TypeAlias = tuple[int, bytes]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # 2.2
VERSION_2_PROXY = 0x21  # 2.2: version 2, command PROXY
TCP4, TCP6 = 0x11, 0x21  # 2.2: address family and transport
PP2_ALPN, PP2_AUTHORITY = 0x01, 0x02  # 2.2.1, 2.2.2
# 2.2: "a receiver may be configured to support 216 bytes or more"; ours fit with a name of 253 bytes, and into one segment.
V2_SIZE = 1024


def header(version: Version, source: Address, destination: Address, tlvs: Iterable[Tlv] = ()) -> bytes:
    """The header of `version`; version 1 has no room for TLVs. Raises ValueError when they are too large."""
    return v1(source, destination) if version == "v1" else v2(source, destination, tlvs)


def v1(source: Address, destination: Address) -> bytes:
    """A line of text (2.1), which cannot tell of two addresses of different families."""
    if source.ip.version != destination.ip.version:
        return b"PROXY UNKNOWN\r\n"
    family = "TCP4" if source.ip.version == 4 else "TCP6"
    return f"PROXY {family} {source.ip} {destination.ip} {source.port} {destination.port}\r\n".encode("ascii")


def v2(source: Address, destination: Address, tlvs: Iterable[Tlv] = ()) -> bytes:
    """A binary header (2.2). Of two addresses of different families, the IPv4 one is told as v4-mapped."""
    if source.ip.version == destination.ip.version == 4:
        family, ends = TCP4, source.ip.packed + destination.ip.packed
    else:
        family, ends = TCP6, _as_v6(source.ip) + _as_v6(destination.ip)
    rest = ends + struct.pack("!HH", source.port, destination.port)
    rest += b"".join(struct.pack("!BH", kind, len(content)) + content for kind, content in tlvs)
    if len(rest) > V2_SIZE:
        raise ValueError(f"a PROXY header of {len(rest)} bytes; at most {V2_SIZE}")
    return SIGNATURE + struct.pack("!BBH", VERSION_2_PROXY, family, len(rest)) + rest


def names(sni: str | None, alpn: str | None) -> list[Tlv]:
    """TLVs for what the client wrote in its ClientHello (peek.Names); of the protocols the first is told."""
    tlvs = []
    if alpn:
        tlvs.append((PP2_ALPN, alpn.partition(",")[0].encode()))
    if sni:
        tlvs.append((PP2_AUTHORITY, sni.encode()))
    return tlvs


def _as_v6(ip: IpAddress) -> bytes:
    return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
