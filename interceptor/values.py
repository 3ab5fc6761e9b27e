"""The typed values a configuration is made of. Each parses its text once and refuses the rest. No I/O.

Every `parse_*` raises ValueError whose text says what would be right, ready to be put behind the option's name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias, TypeVar

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_PORT = 65535
MAX_ID = 2**32 - 2  # 2**32 - 1 is (uid_t)-1, "no user": linux/uidgid.h
MAX_MARK = 2**32 - 1
IFNAME_SIZE = 15  # IFNAMSIZ is 16 with the terminating NUL: linux/if.h
# What the kernel's dev_valid_name() allows, less what nft and iptables give a meaning of their own (quotes, '+', '!').
_IFNAME = r"[A-Za-z0-9_.@-]+"

_MARK = r"0[xX][0-9a-fA-F]{1,10}|0|[1-9][0-9]{0,9}"

NameLookup: TypeAlias = Callable[[str], int]


class Family(Enum):
    """An IP version."""

    V4 = "v4"
    V6 = "v6"

    @classmethod
    def of(cls, network: Network | Address) -> Family:
        """The family that `network` belongs to."""
        return cls.V4 if network.version == 4 else cls.V6


class Proto(Enum):
    """A transport protocol that can be captured."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True, order=True)
class IdRange:
    """User or group ids `first` to `last`, both included; 32 bits."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Mark:
    """A packet mark under a mask: matches where `packet mark & mask == value`, sets only the mask's bits."""

    value: int
    mask: int = MAX_MARK

    def __str__(self) -> str:
        return hex(self.value) if self.mask == MAX_MARK else f"{self.value:#x}/{self.mask:#x}"

    def matches(self, mark: int) -> bool:
        """Whether a packet with `mark` carries this mark."""
        return mark & self.mask == self.value

    def put(self, mark: int) -> int:
        """`mark` after this one was set on it."""
        return (mark & ~self.mask & MAX_MARK) | self.value


@dataclass(frozen=True, slots=True)
class UidRule:
    """One `[proto:[ports:]]uids`: what these users send over these protocols to these ports."""

    protos: tuple[Proto, ...]
    ports: tuple[PortRange, ...]  # empty: every port
    uids: tuple[IdRange, ...]

    def __str__(self) -> str:
        proto = self.protos[0].value if len(self.protos) == 1 else "*"
        ports = join(self.ports) or "*"
        return f"{proto}:{ports}:{join(self.uids)}"


_Range = TypeVar("_Range", PortRange, IdRange)
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Server:
    """Where something listens. The text is `ip:port`, or `[ip]:port` for IPv6."""

    ip: Address
    port: int

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}" if self.ip.version == 4 else f"[{self.ip}]:{self.port}"


def join(values: Iterable[object]) -> str:
    """The canonical text of a list: comma-separated, as every list option takes it."""
    return ",".join(str(value) for value in values)


def items(text: str) -> list[str]:
    """The elements of a comma list. Blanks around them and a trailing comma are allowed, as Istio's users expect."""
    return [item for item in (part.strip() for part in text.split(",")) if item]


def parse_port(text: str) -> int:
    """A port number, 1 to 65535."""
    number = _decimal(text)
    if number is None or not 1 <= number <= MAX_PORT:
        raise ValueError(f"{text!r} is no port: a number from 1 to {MAX_PORT}")
    return number


def parse_ports(text: str) -> tuple[PortRange, ...]:
    """Ports and ranges in a comma list, sorted and merged. `*` alone means all and gives ()."""
    if text.strip() == "*":
        return ()
    return merge(_each(text, lambda item: PortRange(*_bounds(item, parse_port))))


def parse_ids(text: str, lookup: NameLookup) -> tuple[IdRange, ...]:
    """User (or group) ids, ranges and names in a comma list, sorted and merged.

    `lookup` gives a name's id and raises KeyError for an unknown one.
    """

    def parse_id(item: str) -> int:
        number = _decimal(item)
        if number is None:
            return _named_id(item, lookup)
        if number > MAX_ID:
            raise ValueError(f"{item!r} is no id: a number from 0 to {MAX_ID}, a range of them, or a name")
        return number

    return merge(_each(text, lambda item: IdRange(*_bounds(item, parse_id))))


def parse_id(text: str, lookup: NameLookup) -> int:
    """One user's (or group's) id, by number or name."""
    found = parse_ids(text, lookup)
    if len(found) != 1 or found[0].first != found[0].last:
        raise ValueError("one number or name is wanted")
    return found[0].first


def parse_servers(text: str, port: int) -> tuple[Server, ...]:
    """`ip`, `ip:port` or `[ip]:port`, separated by commas; `port` is for those that name none. Raises ValueError."""
    return tuple(dict.fromkeys(_each(text, lambda item: _parse_server(item, port))))


def parse_cidrs(text: str) -> tuple[Network, ...]:
    """Addresses and CIDRs of both families in a comma list; host bits must be zero. `*` alone gives ()."""
    if text.strip() == "*":
        return ()
    found = dict.fromkeys(_each(text, _parse_cidr))
    # Overlaps would be refused by an nft interval set: keep the widest of each.
    collapsed: list[Network] = []
    for family in Family:
        members = [network for network in found if Family.of(network) is family]
        collapsed.extend(ipaddress.collapse_addresses(members))  # type: ignore[type-var]
    return tuple(collapsed)


def kernel_text(address: Address) -> str:
    """As inet_ntop(3) writes it, and so nft and iptables do: IPv6 addresses that hold an IPv4 one end in dotted form."""
    packed = address.packed
    mapped = packed[:12] == bytes(10) + b"\xff\xff"
    if address.version == 6 and (mapped or (packed[:12] == bytes(12) and packed[12:14] != bytes(2))):
        return ("::ffff:" if mapped else "::") + str(ipaddress.IPv4Address(packed[12:]))
    return str(address)


def parse_ifname(text: str) -> str:
    """A network interface's name."""
    if not re.fullmatch(_IFNAME, text) or len(text) > IFNAME_SIZE or text in (".", ".."):
        raise ValueError(f"{text!r} is no interface name: 1 to {IFNAME_SIZE} of A-Z a-z 0-9 _ . @ -")
    return text


def parse_mark(text: str) -> Mark:
    """VALUE[/MASK], decimal or 0x-hexadecimal, 32 bits; the value must lie within the mask and be non-zero."""
    value_text, slash, mask_text = text.partition("/")
    value, mask = mark_number(value_text), mark_number(mask_text) if slash else MAX_MARK
    if value is None or mask is None:
        raise ValueError("a mark is VALUE or VALUE/MASK, decimal or 0x…")
    if not 1 <= value <= MAX_MARK or not 1 <= mask <= MAX_MARK:
        raise ValueError("a mark and its mask are numbers from 1 to 0xffffffff")
    if value & ~mask:
        raise ValueError("the mark has bits outside its mask")
    return Mark(value, mask)


def mark_number(text: str) -> int | None:
    """One number of a mark, decimal or 0x-hexadecimal; None for what is none, or has more than 10 digits."""
    # int() would also take "1_0", "0b1" and other scripts' digits.
    return int(text, 0) if re.fullmatch(_MARK, text.strip()) else None


def parse_uid_rules(text: str, lookup: NameLookup) -> tuple[UidRule, ...]:
    """`[proto:[ports:]]uids`, several separated by `;`. proto is tcp, udp or *; ports a list, ranges or *."""
    return tuple(_uid_rule(part.strip(), lookup) for part in text.split(";") if part.strip())


def _uid_rule(text: str, lookup: NameLookup) -> UidRule:
    fields = [field.strip() for field in text.split(":")]
    if len(fields) > 3:
        raise ValueError(f"{text!r} has more than [proto:[ports:]]uids")
    proto = fields[0] if len(fields) > 1 else "*"
    if proto not in ("tcp", "udp", "*"):
        raise ValueError(f"{proto!r} is no protocol: tcp, udp or *")
    uids = parse_ids(fields[-1], lookup)
    if not uids:
        raise ValueError(f"{text!r} names no uid: [proto:[ports:]]uids")
    protos = tuple(Proto) if proto == "*" else (Proto(proto),)
    return UidRule(protos, parse_ports(fields[1]) if len(fields) == 3 else (), uids)


def _parse_server(item: str, port: int) -> Server:
    host, colon, number = item.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, number = item, str(port)
    try:
        ip = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        return Server(ip, parse_port(number))
    except ValueError:
        raise ValueError(f"{item!r} is neither an IP address nor ip:port or [ip]:port") from None


def _parse_cidr(item: str) -> Network:
    if "%" in item:
        raise ValueError(f"{item!r} is no CIDR (rules know no scope like %eth0); write 10.0.0.0/8 or fd00::/8")
    try:
        return ipaddress.ip_network(item)
    except ValueError as error:
        reason = "host bits are set" if "host bits" in str(error) else "not an address"
        raise ValueError(f"{item!r} is no CIDR ({reason}); write 10.0.0.0/8 or fd00::/8") from error


def _each(text: str, parse: Callable[[str], _Item]) -> list[_Item]:
    """Every element of a comma list, parsed. Raises ValueError that names all bad ones, not only the first."""
    found: list[_Item] = []
    problems: list[str] = []
    for item in items(text):
        try:
            found.append(parse(item))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return found


def merge(ranges: Iterable[_Range]) -> tuple[_Range, ...]:
    """`ranges` sorted, with overlapping and adjacent ones joined: the one form that can be compared."""
    merged: list[_Range] = []
    for new in sorted(ranges):
        if merged and new.first <= merged[-1].last + 1:
            previous = merged.pop()
            new = type(previous)(previous.first, max(previous.last, new.last))  # noqa: PLW2901
        merged.append(new)
    return tuple(merged)


def contains(ranges: Iterable[PortRange | IdRange], number: int) -> bool:
    """Whether `number` lies in one of `ranges`."""
    return any(item.first <= number <= item.last for item in ranges)


def _decimal(text: str) -> int | None:
    # int() would also take "1_000", " 7", "+7" and other scripts' digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else None


def _bounds(text: str, parse: Callable[[str], int]) -> tuple[int, int]:
    first_text, dash, last_text = text.partition("-")
    if not dash or not _is_range(first_text, last_text):
        number = parse(text)
        return number, number
    first, last = parse(first_text.strip()), parse(last_text.strip())
    if first > last:
        raise ValueError(f"the range {text!r} runs backwards; write {last}-{first}")
    return first, last


def _is_range(first: str, last: str) -> bool:
    # User names may hold a dash (istio-proxy): only digits on both sides, or an open side, make a range.
    return all(not side.strip() or side.strip()[0].isdigit() for side in (first, last))


def _named_id(name: str, lookup: NameLookup) -> int:
    if not name or not (name[0].isalpha() or name[0] == "_"):
        raise ValueError(f"{name!r} is no id: a number from 0 to {MAX_ID}, a range of them, or a name")
    try:
        return lookup(name)
    except KeyError as error:
        raise ValueError(f"no user or group is named {name!r} here; give its number") from error
