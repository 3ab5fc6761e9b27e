"""How each type of option is read from text and shown as text. Knows no option. No I/O."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from interceptor.values import (
    items,
    join,
    parse_cidrs,
    parse_ids,
    parse_ifname,
    parse_mark,
    parse_port,
    parse_ports,
    parse_servers,
    parse_uid_rules,
)


@dataclass(frozen=True, slots=True)
class Names:
    """Gives the id of a user and of a group; both raise KeyError for an unknown name."""

    uid: Callable[[str], int]
    gid: Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Kind:
    """How one type of option is read from text and shown as text. `parse(show(value)) == value`."""

    metavar: str
    parse: Callable[[str, Names], Any]
    show: Callable[[Any], str] = str
    separator: str | None = None  # what joins several occurrences; None: the last one wins
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Kind:
    """One of these words."""

    def parse(text: str, _names: Names) -> str:
        if text not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return text

    return Kind("|".join(choices), parse, choices=choices)


def _switch(text: str, _names: Names) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _excludable(parse: Callable[[str], Any]) -> Callable[[str, Names], Any]:
    def parse_excluded(text: str, _names: Names) -> Any:
        if text.strip() == "*":
            raise ValueError("excluding everything is --inbound off or --outbound off")
        return parse(text)

    return parse_excluded


def _cgroup(text: str, _names: Names) -> str:
    # It stands between quotes in nft text: no quote, no control character, no backslash. nft counts its components.
    path = text.strip("/ ")
    if not path.isprintable() or any(character in '"\\' for character in path) or {"", ".", ".."} & set(path.split("/")):
        raise ValueError("a cgroup v2 path below /sys/fs/cgroup, like kubepods/pod1234")
    return path


def _directory(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise ValueError("an absolute path")
    return text


def _cgroup_or_root(text: str, names: Names) -> str:
    return "/" if text.strip() == "/" else _cgroup(text, names)


def _route_table(text: str, _names: Names) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
    if not 1 <= number < 2**32 or number in (253, 254, 255):
        raise ValueError("a routing table's number, 1 to 4294967295 without 253, 254 and 255 (default, main, local)")
    return number


def _or_word(word: str, parse: Callable[[str], Any]) -> Callable[[str, Names], Any]:
    """`word` stands for None."""

    def parse_or_word(text: str, _names: Names) -> Any:
        return None if text.strip() == word else parse(text.strip())

    return parse_or_word


def _show_or_word(word: str, show: Callable[[Any], str] = str) -> Callable[[Any], str]:
    return lambda value: word if value is None else show(value)


_DURATION = r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)?"
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Timers count milliseconds in 32 bits (epoll_wait(2)); nobody waits longer than a month.
MAX_DURATION_S = 30 * 86400.0


def _duration(text: str) -> float:
    match = re.fullmatch(_DURATION, text)
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else math.nan
    if not 0 < seconds <= MAX_DURATION_S:
        raise ValueError("a time over 0 and up to 30d: seconds, or a number with ms, s, m, h or d")
    return seconds


def _show_duration(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds:.6f}".rstrip("0") + "s"


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if number == 0:
        raise ValueError("a number, 1 or more")
    return number


def _some_of(*choices: str) -> Kind:
    """Any of these words, as a sorted tuple; `off` is none of them."""

    def parse(text: str, _names: Names) -> tuple[str, ...]:
        words = [] if text.strip() == "off" else items(text)
        if not set(words) <= set(choices) or (not words and text.strip() != "off"):
            raise ValueError("off, or one or more of " + ", ".join(choices))
        return tuple(sorted(set(words)))

    return Kind("off|" + ",".join(choices), parse, lambda words: ",".join(words) or "off", ",")


PORT = Kind("PORT", lambda text, _: parse_port(text.strip()))
OPTIONAL_PORT = Kind("PORT|off", _or_word("off", parse_port), _show_or_word("off"))
DURATION = Kind("TIME", lambda text, _: _duration(text.strip()), _show_duration)
GRACE = Kind("TIME", lambda text, _: 0.0 if text.strip() in ("0", "0s") else _duration(text.strip()), _show_duration)
OPTIONAL_DURATION = Kind("TIME|off", _or_word("off", _duration), _show_or_word("off", _show_duration))
OPTIONAL_COUNT = Kind("N|off", _or_word("off", _count), _show_or_word("off"))
AUTOMATIC_COUNT = Kind("N|auto", _or_word("auto", _count), _show_or_word("auto"))
# 53: domain (IANA's registry of ports).
RESOLVERS = Kind("SERVERS", lambda text, _: parse_servers(text, 53), join, ",")
NAMES_SEEN = _some_of("sni", "host")
PORTS = Kind("PORTS", lambda text, _: parse_ports(text), join, ",")
EXCLUDED_PORTS = Kind("PORTS", _excludable(parse_ports), join, ",")
CIDRS = Kind("CIDRS", lambda text, _: parse_cidrs(text), join, ",")
EXCLUDED_CIDRS = Kind("CIDRS", _excludable(parse_cidrs), join, ",")
UIDS = Kind("UIDS", lambda text, names: parse_ids(text, names.uid), join, ",")
GIDS = Kind("GIDS", lambda text, names: parse_ids(text, names.gid), join, ",")
UID_RULES = Kind(
    "RULES",
    lambda text, names: parse_uid_rules(text, names.uid),
    lambda rules: ";".join(str(rule) for rule in rules),
    ";",
)
INTERFACES = Kind("NAMES", lambda text, _: tuple(dict.fromkeys(parse_ifname(item) for item in items(text))), join, ",")
MARK = Kind("VALUE[/MASK]", lambda text, _: parse_mark(text))
OPTIONAL_MARK = Kind(
    "VALUE[/MASK]",
    lambda text, _: parse_mark(text) if text.strip() else None,
    lambda mark: "" if mark is None else str(mark),
)
CGROUP = Kind("PATH", lambda text, names: _cgroup(text, names) if text.strip() else None, lambda path: path or "")
OPTIONAL_DIRECTORY = Kind("DIR", lambda text, _: _directory(text) if text.strip() else None, lambda path: path or "")
CAPTURE_CGROUP = Kind(
    "PATH",
    lambda text, names: _cgroup_or_root(text, names) if text.strip() else None,
    lambda path: path or "",
)
TABLE = Kind("TABLE", _route_table)
SWITCH = Kind("", _switch, lambda value: "true" if value else "false", choices=("true", "false"))
MECHANISM = one_of("redirect", "tproxy", "off")


def option(group: str, kind: Kind, default: Any, text: str) -> Any:
    """A dataclass field that is an option, shown under `group` with `text` for its help."""
    return dataclasses.field(default=default, metadata={"group": group, "kind": kind, "help": text})
