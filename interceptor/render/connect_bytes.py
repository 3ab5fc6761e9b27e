"""A connect policy as the bytes of its BPF maps, and back. No I/O. The layout is that of connect.bpf.c.

Every list becomes prefixes of one longest-prefix-match map. Since a lookup finds the longest alone, each prefix says all
lists that hold it: those of the shorter ones above it as well.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from interceptor.errors import Unsupported
from interceptor.render.connect_policy import (
    FACT_CGROUP,
    FACT_MARK,
    FIRST_LIST,
    MAX_FACTS,
    MAX_LINES,
    Does,
    Line,
    Members,
    Policy,
    collapsed,
)
from interceptor.values import IdRange, Mark, Network, PortRange, merge

OF_V4, OF_V6, OF_PORT, OF_UID, OF_GID = range(1, 6)
BITS = {OF_V4: 32, OF_V6: 128, OF_PORT: 16, OF_UID: 32, OF_GID: 32}
KEY = struct.Struct("=IB19s")  # struct set_key; the prefix's length is counted from the second member
KEY_SIZE = KEY.size
FACTS = struct.Struct("=4Q")
LINE = struct.Struct("=4QII")  # struct rule
# struct policy up to its rules: netns cookie, cgroup, mark, mask, set of lists, rules, source
HEADER = struct.Struct("=QQIIII4s4x")
POLICY_SIZE = HEADER.size + MAX_LINES * LINE.size
MAX_PREFIXES = 65536


@dataclass(frozen=True, slots=True)
class Placed:
    """What a policy needs to know of the place that it works in. `cgroup` is the id of the policy's, 0 without one."""

    netns_cookie: int
    sets: int
    cgroup: int = 0


def pack(policy: Policy, placed: Placed) -> bytes:
    """The value of the policy map."""
    mark = policy.mark or Mark(0, 0)
    header = HEADER.pack(
        placed.netns_cookie,
        placed.cgroup,
        mark.value,
        mark.mask,
        placed.sets,
        len(policy.lines),
        policy.source.packed if policy.source is not None else b"",
    )
    lines = b"".join(FACTS.pack(*_words(line.needs)) + struct.pack("=II", line.does, line.argument) for line in policy.lines)
    return (header + lines).ljust(POLICY_SIZE, b"\0")


def placed_of(content: bytes) -> Placed:
    """What a policy map says of its place."""
    cookie, cgroup, _, _, sets, *_ = HEADER.unpack_from(content)
    return Placed(cookie, sets, cgroup)


def pack_lists(policy: Policy) -> dict[bytes, bytes]:
    """The entries of the map of lists. Raises Unsupported for more than it can hold."""
    entries: dict[bytes, bytes] = {}
    for of, bits in BITS.items():
        facts: dict[tuple[int, int], int] = {}
        for number, members in enumerate(policy.lists):
            for prefix in _prefixes(of, members):
                facts[prefix] = facts.get(prefix, 0) | 1 << (FIRST_LIST + number)
        for value, length in facts:
            above = (facts.get((value >> bits - short << bits - short, short), 0) for short in range(length + 1))
            entries[_key(of, bits, value, length)] = _all(above).to_bytes(FACTS.size, "little")
    if len(entries) > MAX_PREFIXES:
        raise Unsupported(f"--outbound connect: the lists make {len(entries)} prefixes; at most {MAX_PREFIXES}")
    return entries


def unpack(content: bytes, lists: dict[bytes, bytes]) -> Policy:
    """The policy that the maps hold: equal to the one that was packed, but that a cgroup is named by its id."""
    _, cgroup, mark, mask, _, count, source = HEADER.unpack_from(content)
    lines = tuple(
        Line(tuple(_facts(words)), Does(does), argument)
        for *words, does, argument in LINE.iter_unpack(content[HEADER.size : HEADER.size + min(count, MAX_LINES) * LINE.size])
    )
    used = {fact for line in lines for fact in line.needs}
    return Policy(
        tuple(_unpacked_lists(lists)),
        lines,
        Mark(mark, mask) if FACT_MARK in used else None,
        str(cgroup) if FACT_CGROUP in used else None,
        ipaddress.ip_address(source) if any(source) else None,
    )


def _unpacked_lists(entries: dict[bytes, bytes]) -> Iterator[Members]:
    found: dict[int, list[tuple[int, int, int]]] = {}
    for key, value in entries.items():
        length, of, packed = KEY.unpack(key)
        number = int.from_bytes(packed[: BITS[of] // 8], "big")
        for fact in _facts(FACTS.unpack(value)):
            found.setdefault(fact, []).append((of, number, length - 8))
    for fact in range(FIRST_LIST, max(found, default=0) + 1):
        yield _members(found.get(fact, []))


def _members(prefixes: Iterable[tuple[int, int, int]]) -> Members:
    networks: list[Network] = []
    ports: list[PortRange] = []
    uids: list[IdRange] = []
    gids: list[IdRange] = []
    for of, value, length in prefixes:
        last = value + (1 << BITS[of] - length) - 1
        if of == OF_V4:
            networks.append(ipaddress.IPv4Network((value, length)))
        elif of == OF_V6:
            networks.append(ipaddress.IPv6Network((value, length)))
        elif of == OF_PORT:
            ports.append(PortRange(value, last))
        else:
            (uids if of == OF_UID else gids).append(IdRange(value, last))
    return Members(collapsed(networks), merge(ports), merge(uids), merge(gids))


def _prefixes(of: int, members: Members) -> Iterator[tuple[int, int]]:
    """(value, length) of each prefix of one kind."""
    if of in (OF_V4, OF_V6):
        for network in members.networks:
            if network.max_prefixlen == BITS[of]:
                yield int(network.network_address), network.prefixlen
        return
    ranges: dict[int, tuple[PortRange, ...] | tuple[IdRange, ...]] = {
        OF_PORT: members.ports,
        OF_UID: members.uids,
        OF_GID: members.gids,
    }
    for item in ranges[of]:
        yield from _split(item.first, item.last, BITS[of])


def _split(first: int, last: int, bits: int) -> Iterator[tuple[int, int]]:
    """The fewest prefixes that make the range."""
    while first <= last:
        # As large as its first number is aligned to, and as is left.
        size = min(first & -first or 1 << bits, 1 << (last - first + 1).bit_length() - 1)
        yield first, bits - (size.bit_length() - 1)
        first += size


def _key(of: int, bits: int, value: int, length: int) -> bytes:
    return KEY.pack(8 + length, of, value.to_bytes(bits // 8, "big"))


def _words(facts: Iterable[int]) -> tuple[int, ...]:
    return FACTS.unpack(_all(1 << fact for fact in facts).to_bytes(FACTS.size, "little"))


def _facts(words: Iterable[int]) -> Iterator[int]:
    for number, word in enumerate(words):
        yield from (number * 64 + bit for bit in range(64) if word >> bit & 1)


def _all(bits: Iterable[int]) -> int:
    together = 0
    for each in bits:
        together |= each
    return together


assert FACTS.size * 8 == MAX_FACTS
