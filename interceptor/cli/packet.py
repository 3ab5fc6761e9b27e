"""The packet that `explain` is asked about: from texts, with what is left out filled in as this host would."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from interceptor import facts, netns
from interceptor.errors import Problem
from interceptor.plan.walk import Packet
from interceptor.sources import local_names
from interceptor.values import MAX_MARK, Address, Proto, mark_number, parse_id, parse_ifname, parse_port

# Where no address can be read: the documentation's own ones (RFC 5737, RFC 3849).
HOST = {4: ipaddress.ip_address("192.0.2.1"), 6: ipaddress.ip_address("2001:db8::1")}
STRANGER = {4: ipaddress.ip_address("198.51.100.1"), 6: ipaddress.ip_address("2001:db8:1::1")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user said of the packet; None where nothing was."""

    proto: Proto
    dport: int
    mark: int
    src: Address | None
    dst: Address | None
    uid: int | None
    gid: int | None
    in_interface: str | None
    out_interface: str | None


def read(texts: Mapping[str, Any]) -> tuple[Asked | None, list[Problem]]:
    """explain's options by their names, and all that is wrong with them."""
    problems: list[Problem] = []
    names = local_names()
    parsers: dict[str, Callable[[str], Any]] = {
        "proto": Proto,
        "uid": lambda text: parse_id(text, names.uid),
        "gid": lambda text: parse_id(text, names.gid),
        "src": _address,
        "dst": _address,
        "dport": parse_port,
        "mark": _mark,
        "in_interface": parse_ifname,
        "out_interface": parse_ifname,
    }
    found: dict[str, Any] = {}
    for name, parse in parsers.items():
        try:
            found[name] = None if texts[name] is None else parse(texts[name])
        except ValueError as error:
            problems.append(Problem(_flag(name), texts[name], str(error)))
    problems += _contradictions(texts, found)
    return (None if problems or texts["proto"] is None else Asked(**found)), problems


def _contradictions(texts: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Problem]:
    inbound = texts["in_interface"] is not None
    if texts["dst"] is None and not inbound:
        yield Problem("--dst", "", "where does the packet go? An address, like 93.184.216.34")
    src, dst = found.get("src"), found.get("dst")
    if src is not None and dst is not None and src.version != dst.version:
        yield Problem("--src", str(src), f"is of another IP family than --dst {dst}")
    for name in ("uid", "gid", "out_interface"):
        if inbound and texts[name] is not None:
            expected = "a packet that comes in, as --in-interface says, has no local sender and has not been routed yet"
            yield Problem(_flag(name), texts[name], f"{expected}; leave one of the two out")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def packet_from(asked: Asked, namespace: str | None) -> Packet:
    """The packet, with what was not said filled in as this host, or the namespace, would. Raises NetnsError."""
    with netns.entered(None if namespace is None else netns.locate(namespace)):
        local = facts.local_addresses()
    rest: dict[str, Any] = {"proto": asked.proto, "dport": asked.dport, "mark": asked.mark}
    src, dst = asked.src, asked.dst
    if asked.in_interface is not None:
        version = (dst or src or HOST[4]).version
        dst = dst or _own(local, version)
        return Packet(src=src or STRANGER[version], dst=dst, in_interface=asked.in_interface, local=local, **rest)
    assert dst is not None
    # The kernel gives what goes to an own address that same address as its source.
    to_itself = dst.is_loopback or dst in local
    src = src or (dst if to_itself else _own(local, dst.version))
    uid = os.getuid() if asked.uid is None else asked.uid
    gid = uid if asked.gid is None else asked.gid
    out = asked.out_interface or ("lo" if to_itself else "eth0")
    return Packet(src=src, dst=dst, uid=uid, gid=gid, out_interface=out, local=local | {src}, **rest)


def describe(packet: Packet) -> str:
    """The packet in one line."""
    return ", ".join(_parts(packet))


def _parts(packet: Packet) -> Iterator[str]:
    dst = f"[{packet.dst}]" if packet.dst.version == 6 else str(packet.dst)
    yield f"{packet.proto.value} {packet.src} -> {dst}:{packet.dport}"
    if packet.uid is not None:
        yield f"uid {packet.uid}, gid {packet.gid}"
    yield f"in {packet.in_interface}" if packet.in_interface else f"out {packet.out_interface}"
    if packet.mark:
        yield f"mark {packet.mark:#x}"


def _own(local: Iterable[Address], version: int) -> Address:
    usable = [item for item in local if item.version == version and not (item.is_loopback or item.is_link_local)]
    return min(usable, key=int, default=HOST[version])


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address is wanted") from None


def _mark(text: str) -> int:
    number = mark_number(text)
    if number is None or number > MAX_MARK:
        raise ValueError("a mark is a number from 0 to 0xffffffff, decimal or 0x…")
    return number
