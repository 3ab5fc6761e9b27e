"""What can be configured: `Config`, and FIELDS, the one table that flags, environment, annotations, files and --help come from.

No I/O: where the values come from is sources.py's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from interceptor.errors import ConfigError, Problem
from interceptor.kinds import (
    CAPTURE_CGROUP,
    CGROUP,
    CIDRS,
    EXCLUDED_CIDRS,
    EXCLUDED_PORTS,
    GIDS,
    INTERFACES,
    MARK,
    MECHANISM,
    OPTIONAL_MARK,
    OPTIONAL_PORT,
    PORT,
    PORTS,
    SWITCH,
    TABLE,
    UID_RULES,
    UIDS,
    Kind,
    Names,
    one_of,
    option,
)
from interceptor.proxy_options import ProxyOptions
from interceptor.values import Family, IdRange, Mark, Network, PortRange, UidRule, contains, join

__all__ = ["FIELD", "FIELDS", "SWITCH", "Config", "Field", "Kind", "Names", "find_contradictions", "warnings"]

Mechanism: TypeAlias = Literal["redirect", "tproxy", "off"]
Outbound: TypeAlias = Literal["redirect", "tproxy", "connect", "off"]
Backend: TypeAlias = Literal["auto", "nft", "iptables-nft", "iptables-legacy", "libiptc"]


@dataclass(frozen=True, slots=True)
class Field:
    """One row of FIELDS."""

    name: str
    kind: Kind
    default: Any
    help: str
    group: str

    @property
    def flag(self) -> str:
        """`--outbound-port`."""
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """`INTERCEPTOR_OUTBOUND_PORT`."""
        return "INTERCEPTOR_" + self.name.upper()

    @property
    def annotation(self) -> str:
        """`interceptor.io/outbound-port`, on a pod or its namespace."""
        return "interceptor.io/" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ProxyOptions):
    """What to capture and how; and, inherited, how the proxy serves. Frozen and comparable: equal Configs give equal plans."""

    outbound: Outbound = option(
        "Capture",
        one_of("redirect", "tproxy", "connect", "off"),
        "redirect",
        "How outbound TCP reaches the proxy; connect: decided when it is connected, without rules (docs/connect.md).",
    )
    inbound: Mechanism = option("Capture", MECHANISM, "redirect", "How inbound TCP reaches the proxy.")
    udp: Literal["off", "tproxy"] = option("Capture", one_of("off", "tproxy"), "off", "Capture UDP too.")
    dns: Literal["off", "resolv-conf", "all"] = option(
        "Capture",
        one_of("off", "resolv-conf", "all"),
        "off",
        "Capture DNS: to the servers in resolv.conf, or to any server.",
    )
    before_proxy: Literal["block", "bypass"] = option(
        "Capture",
        one_of("block", "bypass"),
        "block",
        "Outbound traffic until the proxy has announced itself: it is refused, or goes direct (docs/before-proxy.md).",
    )
    capture_cgroup: str | None = option(
        "Capture",
        CAPTURE_CGROUP,
        None,
        "With --outbound connect: the cgroup v2 path whose processes are captured; unset: the pod's, if --netns is a pid.",
    )
    outbound_port: int = option("Proxy", PORT, 15001, "The proxy's port for outbound connections.")
    inbound_port: int = option("Proxy", PORT, 15006, "The proxy's port for inbound connections.")
    dns_port: int = option("Proxy", PORT, 15053, "The proxy's port for DNS, UDP and TCP.")
    tunnel_port: int = option("Proxy", PORT, 15008, "The mesh's tunnel port; never captured.")
    probe_port: int = option("Proxy", PORT, 15002, "Destination port of `probe`; never captured from outside.")
    admin_port: int | None = option(
        "Proxy", OPTIONAL_PORT, 15020, "The proxy's port for metrics and health; never captured from outside."
    )
    proxy_uid: tuple[IdRange, ...] = option(
        "Proxy", UIDS, (IdRange(1337, 1337),), "Users whose traffic is the proxy's own and never captured outbound."
    )
    proxy_gid: tuple[IdRange, ...] = option("Proxy", GIDS, (IdRange(1337, 1337),), "Groups likewise.")
    proxy_mark: Mark | None = option("Proxy", OPTIONAL_MARK, None, "The mark that the proxy sets on its sockets (SO_MARK).")
    proxy_cgroup: str | None = option("Proxy", CGROUP, None, "The proxy's cgroup v2 path (nft only).")
    original_source: bool = option(
        "Proxy",
        SWITCH,
        False,
        "The proxy dials the application from the client's own address, not from 127.0.0.6 or ::6.",
    )
    include_inbound_ports: tuple[PortRange, ...] = option("Inbound", PORTS, (), "Capture only these ports.")
    exclude_inbound_ports: tuple[PortRange, ...] = option("Inbound", EXCLUDED_PORTS, (), "Leave these ports alone.")
    exclude_inbound_cidrs: tuple[Network, ...] = option("Inbound", EXCLUDED_CIDRS, (), "Leave clients from here alone.")
    include_outbound_ports: tuple[PortRange, ...] = option("Outbound", PORTS, (), "Capture only these destination ports.")
    exclude_outbound_ports: tuple[PortRange, ...] = option(
        "Outbound", EXCLUDED_PORTS, (), "Leave these destination ports alone."
    )
    include_outbound_cidrs: tuple[Network, ...] = option("Outbound", CIDRS, (), "Capture only these destinations.")
    exclude_outbound_cidrs: tuple[Network, ...] = option("Outbound", EXCLUDED_CIDRS, (), "Leave these destinations alone.")
    include_uids: tuple[IdRange, ...] = option("Outbound", UIDS, (), "Capture only what these users send.")
    exclude_uids: tuple[IdRange, ...] = option("Outbound", UIDS, (), "Leave alone what these users send.")
    include_gids: tuple[IdRange, ...] = option("Outbound", GIDS, (), "Capture only what these groups send.")
    exclude_gids: tuple[IdRange, ...] = option("Outbound", GIDS, (), "Leave alone what these groups send.")
    exclude_outbound_for_uids: tuple[UidRule, ...] = option(
        "Outbound",
        UID_RULES,
        (),
        "Leave alone [proto:[ports:]]uids, like tcp:80,443:1000-1010; separate several by ';'.",
    )
    exclude_interfaces: tuple[str, ...] = option("Interfaces", INTERFACES, (), "Leave these interfaces alone, both ways.")
    virtual_interfaces: tuple[str, ...] = option(
        "Interfaces", INTERFACES, (), "Capture what comes in here as outbound (docker0, a KubeVirt bridge)."
    )
    ip_family: Literal["auto", "v4", "v6", "dual"] = option(
        "IP families",
        one_of("auto", "v4", "v6", "dual"),
        "auto",
        "The families to capture; auto: those the kernel has.",
    )
    uncovered_family: Literal["block", "bypass"] = option(
        "IP families", one_of("block", "bypass"), "block", "What becomes of traffic of a family that is not captured."
    )
    conntrack_timeouts: bool = option(
        "Kernel",
        SWITCH,
        True,
        "Forget reset connections at once, so that a reused source port is captured; docs/decisions/0002.",
    )
    drop_invalid: bool = option("Kernel", SWITCH, False, "Drop packets that conntrack calls invalid.")
    log_rules: bool = option("Kernel", SWITCH, False, "Log each captured or dropped connection in the kernel's log.")
    tproxy_mark: Mark = option(
        "Kernel", MARK, Mark(1337, 0xFFF), "Mark for TPROXY's policy route; this one and the next two values are used."
    )
    tproxy_table: int = option("Kernel", TABLE, 133, "Routing table for TPROXY.")
    backend: Backend = option(
        "Kernel", one_of("auto", "nft", "iptables-nft", "iptables-legacy", "libiptc"), "auto", "What writes the rules."
    )

    def __post_init__(self) -> None:
        problems = find_contradictions({row.name: getattr(self, row.name) for row in FIELDS})
        if problems:
            raise ConfigError(problems)

    @property
    def uses_tproxy(self) -> bool:
        """Whether some traffic is captured by TPROXY."""
        return "tproxy" in (self.inbound, self.outbound, self.udp)

    def family_excluded(self, family: Family) -> bool:
        """Whether `ip_family` names the other family alone."""
        return (self.ip_family, family) in (("v4", Family.V6), ("v6", Family.V4))


FIELDS: tuple[Field, ...] = tuple(
    Field(field.name, field.metadata["kind"], field.default, field.metadata["help"], field.metadata["group"])
    # Those of the capture first, as they stand here.
    for field in sorted(dataclasses.fields(Config), key=lambda field: field.name in ProxyOptions.__dataclass_fields__)
)
FIELD: dict[str, Field] = {field.name: field for field in FIELDS}


def find_contradictions(good: Mapping[str, Any]) -> list[Problem]:
    """Values that are right one by one and wrong together; empty when there are none.

    `good`: option name -> value. An option whose value is not known, as its text was bad, is left out: what can be said
    without it is said all the same.
    """
    problems = _equal_ports({name: good[name] for name in PROXY_PORTS if name in good})
    for check, needs in _CHECKS:
        if all(name in good for name in needs):
            problems += check(*(good[name] for name in needs))
    return problems


def _problem(name: str, value: Any, expected: str) -> Problem:
    return Problem(FIELD[name].flag, FIELD[name].kind.show(value), expected)


def _equal_ports(ports: Mapping[str, int | None]) -> list[Problem]:
    taken: dict[int, str] = {}
    problems = []
    for name, port in ports.items():
        if port is None:
            continue
        if port in taken:
            problems.append(_problem(name, port, f"is {FIELD[taken[port]].flag} too; the proxy's ports must differ"))
        taken.setdefault(port, name)
    return problems


def _uncovered_cidrs(name: str) -> Callable[[Sequence[Network], str], Iterator[Problem]]:
    def check(networks: Sequence[Network], ip_family: str) -> Iterator[Problem]:
        for network in networks:
            family = Family.of(network).value
            if ip_family not in ("auto", "dual", family):
                yield Problem(FIELD[name].flag, str(network), f"an IP{family} CIDR with --ip-family {ip_family}")

    return check


def _no_identity(uid: object, gid: object, mark: Mark | None, cgroup: str | None) -> Iterator[Problem]:
    if not (uid or gid or mark or cgroup):
        expected = "the proxy needs an identity, or its own traffic is captured again: a uid, a gid, a mark or a cgroup"
        yield _problem("proxy_uid", uid, expected)


def _cgroup_without_nft(cgroup: str | None, backend: Backend) -> Iterator[Problem]:
    if cgroup and backend not in ("auto", "nft"):
        yield _problem("proxy_cgroup", cgroup, "only the nft backend matches cgroups; give --backend nft")


def _narrow_mark(mark: Mark) -> Iterator[Problem]:
    last = mark.value + 2
    if last > mark.mask or last & ~mark.mask or (mark.value + 1) & ~mark.mask:
        expected = "the mask has no room for the mark and the two values after it; 0x539/0xfff has"
        yield _problem("tproxy_mark", mark, expected)


def _like_marks(own: Mark | None, mark: Mark) -> Iterator[Problem]:
    if own is None or any(_narrow_mark(mark)):
        return
    if any(own.value & mark.mask == value or own.matches(value) for value in range(mark.value, mark.value + 3)):
        yield _problem("proxy_mark", own, f"can't be told from --tproxy-mark {mark} or the two values after it")


def _virtual_and_excluded(virtual: Sequence[str], excluded: Sequence[str]) -> Iterator[Problem]:
    for name in virtual:
        if name in excluded:
            yield Problem("--virtual-interfaces", name, "is in --exclude-interfaces too")


def _virtual_loopback(virtual: Sequence[str]) -> Iterator[Problem]:
    if "lo" in virtual:
        yield Problem("--virtual-interfaces", "lo", "the loopback interface is no virtual interface")


def _header_for_nobody(version: str, ports: Sequence[PortRange], cidrs: Sequence[Network]) -> Iterator[Problem]:
    wanting = {"upstream_proxy_protocol_ports": ports, "upstream_proxy_protocol_cidrs": cidrs}
    if version == "off":
        for name, value in wanting.items():
            if value:
                yield _problem(name, value, "which header? give --upstream-proxy-protocol v1 or v2")
    elif not any(wanting.values()):
        expected = "sent to nobody: give --upstream-proxy-protocol-ports, or -cidrs; a server that does not expect it breaks"
        yield _problem("upstream_proxy_protocol", version, expected)


NOT_AT_CONNECT = {
    "exclude_interfaces": "--outbound connect decides before the route is known; exclude CIDRs, or use redirect",
    "virtual_interfaces": "what comes in from there is connected elsewhere; --outbound redirect or tproxy captures it",
    "log_rules": "--outbound connect has no packet to log; --outbound redirect or tproxy has",
}


def _not_at_connect(name: str) -> Callable[[Any, Outbound], Iterator[Problem]]:
    """At connect() there is no packet yet: no interface, nothing that others send, nothing to log."""

    def check(value: Any, outbound: Outbound) -> Iterator[Problem]:
        if outbound == "connect" and value:
            yield _problem(name, value, NOT_AT_CONNECT[name])

    return check


def _never_announced(before_proxy: str, outbound: Outbound) -> Iterator[Problem]:
    if outbound == "connect" and before_proxy == "bypass":
        expected = (
            "a proxy announces itself to rules, which --outbound connect does not ask; --outbound redirect or tproxy does"
        )
        yield _problem("before_proxy", before_proxy, expected)


PROXY_PORTS = ("outbound_port", "inbound_port", "dns_port", "tunnel_port", "probe_port", "admin_port")
# Each with the options whose values it is called with: it cannot look at others.
_CHECKS: tuple[tuple[Callable[..., Iterable[Problem]], tuple[str, ...]], ...] = (
    *(
        (_uncovered_cidrs(name), (name, "ip_family"))
        for name in ("exclude_inbound_cidrs", "include_outbound_cidrs", "exclude_outbound_cidrs")
    ),
    (_no_identity, ("proxy_uid", "proxy_gid", "proxy_mark", "proxy_cgroup")),
    (_cgroup_without_nft, ("proxy_cgroup", "backend")),
    (_narrow_mark, ("tproxy_mark",)),
    (_like_marks, ("proxy_mark", "tproxy_mark")),
    (_virtual_and_excluded, ("virtual_interfaces", "exclude_interfaces")),
    (_virtual_loopback, ("virtual_interfaces",)),
    *((_not_at_connect(name), (name, "outbound")) for name in NOT_AT_CONNECT),
    (_never_announced, ("before_proxy", "outbound")),
    (_header_for_nobody, ("upstream_proxy_protocol", "upstream_proxy_protocol_ports", "upstream_proxy_protocol_cidrs")),
)


def warnings(config: Config) -> list[str]:
    """What is allowed and probably not meant: each a sentence for stderr."""
    found = []
    for name in ("include_uids", "exclude_uids"):
        clash = [item for item in getattr(config, name) if any(contains([item], own.first) for own in config.proxy_uid)]
        if clash:
            found.append(
                f"{FIELD[name].flag} {join(clash)} holds the proxy's own uid {join(config.proxy_uid)}: "
                "an application that runs under it goes around the proxy"
            )
    return found
