"""Flows as a readable table, and as JSON with the rule added: who, where to, captured by which rule, bytes, time. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from interceptor.plan.model import Plan
from interceptor.plan.walk import Fate, Packet, walk
from interceptor.values import Address as Ip
from interceptor.values import Proto

RIGHT_ALIGNED = frozenset({"UID", "SENT", "RECV", "TOOK"})
UNKNOWN = {"dns": "a DNS server"}  # what a record without an original destination went to
COMMAND_WIDTH = 20
KIB = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """What a captured packet met: the plan in its namespace, the interface it passed, the namespace's own addresses."""

    plan: Plan
    interface: str
    local: frozenset[Ip] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """What became of a connection, why, and the option behind it."""

    fate: Fate
    why: str
    option: str


@dataclass(frozen=True, slots=True)
class Seen:
    """One connection as it is shown. `record` is the proxy's flow record, or what is known of a connection it never saw."""

    record: Mapping[str, Any]
    rule: Rule
    pod: str = ""

    def as_json(self) -> dict[str, Any]:
        """The record, with the pod before and the rule behind it."""
        pod = {"pod": self.pod} if self.pod else {}
        return {**pod, **self.record, "fate": self.rule.fate, "rule": self.rule.why, "option": self.rule.option}


def see(record: Mapping[str, Any], place: Place, pod: str = "") -> Seen:
    """A flow record (proxy/flows.py, as JSON) with the rule that captured it, found by walking the plan at `place`."""
    if record["direction"] == "dns":
        # A datagram's own destination is not in its record; every way to the DNS listener is the same decision.
        return Seen(record, Rule("captured", "DNS goes to the proxy", "--dns"), pod)
    if record["original_dst"] is None:
        return Seen(record, Rule("captured", "its original destination is not known", ""), pod)
    return Seen(record, decide(place, _first_packet(record, place)), pod)


def decide(place: Place, packet: Packet) -> Rule:
    """The rule that decides about `packet`."""
    outcome = walk(place.plan, packet)
    if outcome.deciding is None:
        return Rule(outcome.fate, "no rule meets it", "")
    return Rule(outcome.fate, outcome.deciding.rule.why, outcome.deciding.rule.option)


def _first_packet(record: Mapping[str, Any], place: Place) -> Packet:
    source, _ = parse_address(record["client"])
    destination, port = parse_address(record["original_dst"])
    proto = Proto(record["protocol"])
    if record["direction"] == "inbound":
        return Packet(proto, source, destination, port, in_interface=place.interface, local=place.local)
    own = destination.is_loopback or destination in place.local
    interface = "lo" if own else place.interface
    return Packet(proto, source, destination, port, uid=record["uid"], out_interface=interface, local=place.local)


def parse_address(text: str) -> tuple[Ip, int]:
    """`192.0.2.1:80` or `[2001:db8::1%2]:80`, as sockets.Address writes them."""
    host, _, port = text.rpartition(":")
    return ipaddress.ip_address(host.strip("[]").partition("%")[0]), int(port)


def lines(seen: Iterable[Seen]) -> list[str]:
    """The table, its heading first, in 120 columns unless names are long. A column that says nothing is left out.

    It is short where `as_json` is not: the rule by its option, which says the direction too; an end only when it is unusual.
    """
    rows = [_row(one) for one in seen]
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    return [_aligned(row, widths) for row in ({name: name for name in columns}, *rows)] if rows else []


def _row(seen: Seen) -> dict[str, str]:
    record = seen.record
    direct = seen.rule.fate == "direct"
    return {
        "TIME": (record.get("time") or "").partition("T")[2].rstrip("Z"),
        "POD": seen.pod,
        "WHO": _who(record),
        "UID": "" if record.get("uid") is None else str(record["uid"]),
        "DESTINATION": str(record["original_dst"] or UNKNOWN.get(record["direction"], "?")),
        "RULE": seen.rule.option or seen.rule.why,
        "SENT": "" if direct else amount(record["bytes_sent"]),
        "RECV": "" if direct else amount(record["bytes_received"]),
        "TOOK": "" if direct else f"{record['duration_ms']:.1f} ms",
        "END": "direct" if direct else _end(record),
    }


def _who(record: Mapping[str, Any]) -> str:
    pid, command = record.get("pid"), record.get("command") or ""
    program = command.partition(" ")[0].rpartition("/")[2][:COMMAND_WIDTH]
    return (program if pid is None else f"{program}[{pid}]") or "?"


def _end(record: Mapping[str, Any]) -> str:
    reason = str(record["reason"]).replace("_", " ")
    if record.get("error"):
        return f"{reason}: {record['error']}"
    return "" if reason == "closed" else reason


def _aligned(row: Mapping[str, str], widths: Mapping[str, int]) -> str:
    cells = (row[name].rjust(width) if name in RIGHT_ALIGNED else row[name].ljust(width) for name, width in widths.items())
    return "  ".join(cells).rstrip()


def amount(count: int) -> str:
    """`812 B`, `3.4 KiB`, `64.0 MiB`."""
    if count < KIB:
        return f"{count} B"
    size, unit = count / KIB, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < KIB:
            break
        size, unit = size / KIB, larger
    return f"{size:.1f} {unit}"
