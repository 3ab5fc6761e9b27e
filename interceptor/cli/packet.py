"""The packet that `explain` is asked about: from texts, with what is left out filled in as this host would."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from interceptor import facts, netns
from interceptor.errors import ConfigError, Problem
from interceptor.plan.walk import Packet
from interceptor.sources import local_names
from interceptor.values import MAX_MARK, Address, Proto, parse_ids, parse_ifname, parse_port

# Where no address can be read: the documentation's own ones (RFC 5737, RFC 3849).
HOST = {4: ipaddress.ip_address("192.0.2.1"), 6: ipaddress.ip_address("2001:db8::1")}
STRANGER = {4: ipaddress.ip_address("198.51.100.1"), 6: ipaddress.ip_address("2001:db8:1::1")}
_Value = TypeVar("_Value")


def packet_from(asked: Mapping[str, str | None], namespace: str | None) -> Packet:
    """The packet for explain's options; raises one ConfigError with all that is wrong with them."""
    problems: list[Problem] = []

    def read(name: str, parse: Callable[[str], _Value]) -> _Value | None:
        text = asked[name]
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            problems.append(Problem(f"--{name.replace('_', '-')}", text or "", str(error)))
            return None

    names = local_names()
    uid = read("uid", lambda text: _one_id(text, names.uid))
    gid = read("gid", lambda text: _one_id(text, names.gid))
    src, dst = read("src", _address), read("dst", _address)
    dport, mark = read("dport", parse_port), read("mark", _mark)
    in_interface, out_interface = read("in_interface", parse_ifname), read("out_interface", parse_ifname)
    if dst is None and in_interface is None and not problems:
        problems.append(Problem("--dst", "", "where does the packet go? An address, like 93.184.216.34"))
    if src is not None and dst is not None and src.version != dst.version:
        problems.append(Problem("--src", str(src), f"is of another IP family than --dst {dst}"))
    if problems:
        raise ConfigError(problems)
    with netns.entered(None if namespace is None else netns.locate(namespace)):
        local = facts.local_addresses()
    rest: dict[str, Any] = {"proto": Proto(asked["proto"]), "dport": dport, "mark": mark}
    if in_interface is not None:
        version = (dst or src or HOST[4]).version
        dst = dst or _own(local, version)
        return Packet(src=src or STRANGER[version], dst=dst, in_interface=in_interface, local=local, **rest)
    assert dst is not None
    # The kernel gives what goes to an own address that same address as its source.
    to_itself = dst.is_loopback or dst in local
    src = src or (dst if to_itself else _own(local, dst.version))
    uid = os.getuid() if uid is None else uid
    out = out_interface or ("lo" if to_itself else "eth0")
    gid = uid if gid is None else gid
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


def _one_id(text: str, lookup: Callable[[str], int]) -> int:
    found = parse_ids(text, lookup)
    if len(found) != 1 or found[0].first != found[0].last:
        raise ValueError("one number or name is wanted")
    return found[0].first


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address is wanted") from None


def _mark(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_MARK:
        raise ValueError("a mark is a number from 0 to 0xffffffff, decimal or 0x…")
    return number
