"""Which packets to send so that every captured path is met, by what the plan itself says of them. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from interceptor.config import Config
from interceptor.plan.model import Plan
from interceptor.plan.walk import Outcome, Packet, walk
from interceptor.values import Address, Family, IdRange, PortRange, Proto, contains

Direction: TypeAlias = Literal["outbound", "inbound", "self-call", "dns"]

# Documentation addresses (RFC 5737, RFC 3849): if the rules are broken, a SYN goes nowhere that anybody owns.
FAR: dict[Family, Address] = {
    Family.V4: ipaddress.ip_address("192.0.2.1"),
    Family.V6: ipaddress.ip_address("2001:db8::1"),
}
# The two ends of the interface that neighbour.py makes, from the benchmarking networks (RFC 2544, RFC 5180).
HERE: dict[Family, Address] = {
    Family.V4: ipaddress.ip_address("198.18.255.253"),
    Family.V6: ipaddress.ip_address("2001:2:0:ffff::1"),
}
BESIDE: dict[Family, Address] = {
    Family.V4: ipaddress.ip_address("198.18.255.254"),
    Family.V6: ipaddress.ip_address("2001:2:0:ffff::2"),
}
INTERFACE = "itcprobe0"
ANY_PORT = 8080  # of nobody: a destination port no list names, for when the probe port is itself excluded


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where a captured packet must come up: the proxy's port, and how it gets there."""

    proto: Proto
    family: Family
    port: int
    mechanism: Literal["redirect", "tproxy", "connect"]


@dataclass(frozen=True, slots=True)
class Path:
    """One packet to send, and where it must arrive."""

    direction: Direction
    proto: Proto
    family: Family
    uid: int
    gid: int
    destination: Address
    port: int
    arrives: Arrival
    rule: str
    cgroup: str | None = None  # of whoever must connect it, where that decides

    @property
    def needs_neighbour(self) -> bool:
        """Whether another host must send it."""
        return self.direction == "inbound"

    @property
    def expected(self) -> str:
        """The original destination that must come with it. UDP by NAT carries none: then where it arrives is all."""
        return endpoint(self.destination, self.port)

    def __str__(self) -> str:
        return f"{self.direction} {self.proto.value} IP{self.family.value} to {self.expected} as uid {self.uid}"


def endpoint(address: Address, port: int) -> str:
    """`192.0.2.1:80`, `[2001:db8::1]:80`."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def paths(config: Config, plan: Plan, local: frozenset[Address]) -> tuple[Path, ...]:
    """Every path that `plan` captures; `local` are the namespace's addresses."""
    return tuple(path for family in plan.families for path in _family_paths(config, plan, family, local))


def _family_paths(config: Config, plan: Plan, family: Family, local: frozenset[Address]) -> Iterator[Path]:
    app, proxy = application(config), first(config.proxy_uid, 0)
    protos = [Proto.TCP, Proto.UDP] if config.udp == "tproxy" else [Proto.TCP]
    for proto in protos:
        for port in _ports(config.include_outbound_ports, config.probe_port):
            yield from _path("outbound", plan, _local(proto, family, FAR[family], port, app, local))
        for port in _ports(config.include_inbound_ports, ANY_PORT):
            arriving = Packet(proto, BESIDE[family], HERE[family], port, in_interface=INTERFACE, local=local | {HERE[family]})
            yield from _path("inbound", plan, arriving)
    for proto in Proto if config.dns != "off" else ():
        yield from _path("dns", plan, _local(proto, family, _resolver(plan, family), 53, app, local))
    own = [address for address in sorted(local, key=str) if Family.of(address) is family and not _unusable(address)]
    if own:
        packet = _local(
            Proto.TCP,
            family,
            own[0],
            _ports(config.include_inbound_ports, ANY_PORT)[0],
            (proxy, first(config.proxy_gid, 0)),
            local,
        )
        yield from _path("self-call", plan, packet)


def _path(direction: Direction, plan: Plan, packet: Packet) -> Iterator[Path]:
    """The path of `packet`, if the plan captures it at all."""
    outcome = walk(plan, packet)
    if outcome.fate != "captured" or outcome.port is None or outcome.mechanism is None:
        return
    family = Family.of(packet.dst)
    arrival = Arrival(packet.proto, family, outcome.port, outcome.mechanism)
    uid, gid = packet.uid or 0, packet.gid or 0
    cgroup = plan.connect.cgroup if plan.connect is not None and outcome.mechanism == "connect" else None
    yield Path(direction, packet.proto, family, uid, gid, packet.dst, packet.dport, arrival, _rule(outcome), cgroup)


def _rule(outcome: Outcome) -> str:
    deciding = outcome.deciding
    if deciding is None:
        return "no rule"
    return f"{deciding.chain.table.value}/{deciding.chain.name}: {deciding.rule.why} ({deciding.rule.option})"


def _local(proto: Proto, family: Family, to: Address, port: int, owner: tuple[int, int], local: frozenset[Address]) -> Packet:
    source = next((address for address in sorted(local, key=str) if Family.of(address) is family), HERE[family])
    out = "lo" if to in local or to.is_loopback else "eth0"
    return Packet(proto, source, to, port, owner[0], owner[1], out_interface=out, local=local)


def _ports(included: tuple[PortRange, ...], default: int) -> list[int]:
    return [included[0].first] if included else [default]


def _resolver(plan: Plan, family: Family) -> Address:
    """A server whose queries the plan captures: the first in its DNS rules, else any."""
    for chain in plan.chains:
        for rule in chain.rules:
            if rule.option == "--dns" and rule.match.dst:
                found = [network for network in rule.match.dst if Family.of(network) is family]
                if found:
                    return found[0].network_address
    return FAR[family]


def application(config: Config) -> tuple[int, int]:
    """A (uid, gid) that no list of `config` excludes, and every include list includes."""
    uid = _free(
        config.include_uids,
        (*config.proxy_uid, *config.exclude_uids, *(item for rule in config.exclude_outbound_for_uids for item in rule.uids)),
    )
    return uid, _free(config.include_gids, (*config.proxy_gid, *config.exclude_gids))


def _free(included: tuple[IdRange, ...], excluded: tuple[IdRange, ...]) -> int:
    candidates = (
        (number for item in included for number in range(item.first, min(item.last, item.first + 1000) + 1))
        if included
        else iter(range(65533, 60000, -1))
    )
    return next((number for number in candidates if not contains(excluded, number)), 65533)


def first(ranges: tuple[IdRange, ...], default: int) -> int:
    """The first id of a list."""
    return ranges[0].first if ranges else default


def _unusable(address: Address) -> bool:
    return address.is_loopback or address.is_link_local or address.is_multicast or address == ipaddress.ip_address("::6")
