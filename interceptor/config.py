"""What can be configured: `Config`, and FIELDS, the one table that flags, environment, annotations, files and --help come from.

No I/O: where the values come from is sources.py's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from interceptor.errors import ConfigError, Problem
from interceptor.values import (
    Family,
    IdRange,
    Mark,
    Network,
    PortRange,
    UidRule,
    contains,
    items,
    join,
    parse_cidrs,
    parse_ids,
    parse_ifname,
    parse_mark,
    parse_port,
    parse_ports,
    parse_uid_rules,
)

Mechanism: TypeAlias = Literal["redirect", "tproxy", "off"]
Outbound: TypeAlias = Literal["redirect", "tproxy", "connect", "off"]
Backend: TypeAlias = Literal["auto", "nft", "iptables-nft", "iptables-legacy", "libiptc"]


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


def _one_of(*choices: str) -> Kind:
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


def _cgroup_or_root(text: str, names: Names) -> str:
    return "/" if text.strip() == "/" else _cgroup(text, names)


def _route_table(text: str, _names: Names) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number < 2**32 or number in (253, 254, 255):
        raise ValueError("a routing table's number, 1 to 4294967295 without 253, 254 and 255 (default, main, local)")
    return number


PORT = Kind("PORT", lambda text, _: parse_port(text.strip()))
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
CAPTURE_CGROUP = Kind(
    "PATH",
    lambda text, names: _cgroup_or_root(text, names) if text.strip() else None,
    lambda path: path or "",
)
TABLE = Kind("TABLE", _route_table)
SWITCH = Kind("", _switch, lambda value: "true" if value else "false", choices=("true", "false"))
MECHANISM = _one_of("redirect", "tproxy", "off")


def _option(group: str, kind: Kind, default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "kind": kind, "help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What to capture and how. Frozen and comparable: two equal Configs give equal plans."""

    outbound: Outbound = _option(
        "Capture",
        _one_of("redirect", "tproxy", "connect", "off"),
        "redirect",
        "How outbound TCP reaches the proxy; connect: decided when it is connected, without rules (docs/connect.md).",
    )
    inbound: Mechanism = _option("Capture", MECHANISM, "redirect", "How inbound TCP reaches the proxy.")
    udp: Literal["off", "tproxy"] = _option("Capture", _one_of("off", "tproxy"), "off", "Capture UDP too.")
    dns: Literal["off", "resolv-conf", "all"] = _option(
        "Capture",
        _one_of("off", "resolv-conf", "all"),
        "off",
        "Capture DNS: to the servers in resolv.conf, or to any server.",
    )
    capture_cgroup: str | None = _option(
        "Capture",
        CAPTURE_CGROUP,
        None,
        "With --outbound connect: the cgroup v2 path whose processes are captured; unset: the pod's, if --netns is a pid.",
    )
    outbound_port: int = _option("Proxy", PORT, 15001, "The proxy's port for outbound connections.")
    inbound_port: int = _option("Proxy", PORT, 15006, "The proxy's port for inbound connections.")
    dns_port: int = _option("Proxy", PORT, 15053, "The proxy's port for DNS, UDP and TCP.")
    tunnel_port: int = _option("Proxy", PORT, 15008, "The mesh's tunnel port; never captured.")
    probe_port: int = _option("Proxy", PORT, 15002, "Destination port of `probe`; never captured from outside.")
    proxy_uid: tuple[IdRange, ...] = _option(
        "Proxy", UIDS, (IdRange(1337, 1337),), "Users whose traffic is the proxy's own and never captured outbound."
    )
    proxy_gid: tuple[IdRange, ...] = _option("Proxy", GIDS, (IdRange(1337, 1337),), "Groups likewise.")
    proxy_mark: Mark | None = _option("Proxy", OPTIONAL_MARK, None, "The mark that the proxy sets on its sockets (SO_MARK).")
    proxy_cgroup: str | None = _option("Proxy", CGROUP, None, "The proxy's cgroup v2 path (nft only).")
    original_source: bool = _option(
        "Proxy",
        SWITCH,
        False,
        "The proxy dials the application from the client's own address, not from 127.0.0.6 or ::6.",
    )
    include_inbound_ports: tuple[PortRange, ...] = _option("Inbound", PORTS, (), "Capture only these ports.")
    exclude_inbound_ports: tuple[PortRange, ...] = _option("Inbound", EXCLUDED_PORTS, (), "Leave these ports alone.")
    exclude_inbound_cidrs: tuple[Network, ...] = _option("Inbound", EXCLUDED_CIDRS, (), "Leave clients from here alone.")
    include_outbound_ports: tuple[PortRange, ...] = _option("Outbound", PORTS, (), "Capture only these destination ports.")
    exclude_outbound_ports: tuple[PortRange, ...] = _option(
        "Outbound", EXCLUDED_PORTS, (), "Leave these destination ports alone."
    )
    include_outbound_cidrs: tuple[Network, ...] = _option("Outbound", CIDRS, (), "Capture only these destinations.")
    exclude_outbound_cidrs: tuple[Network, ...] = _option("Outbound", EXCLUDED_CIDRS, (), "Leave these destinations alone.")
    include_uids: tuple[IdRange, ...] = _option("Outbound", UIDS, (), "Capture only what these users send.")
    exclude_uids: tuple[IdRange, ...] = _option("Outbound", UIDS, (), "Leave alone what these users send.")
    include_gids: tuple[IdRange, ...] = _option("Outbound", GIDS, (), "Capture only what these groups send.")
    exclude_gids: tuple[IdRange, ...] = _option("Outbound", GIDS, (), "Leave alone what these groups send.")
    exclude_outbound_for_uids: tuple[UidRule, ...] = _option(
        "Outbound",
        UID_RULES,
        (),
        "Leave alone [proto:[ports:]]uids, like tcp:80,443:1000-1010; separate several by ';'.",
    )
    exclude_interfaces: tuple[str, ...] = _option("Interfaces", INTERFACES, (), "Leave these interfaces alone, both ways.")
    virtual_interfaces: tuple[str, ...] = _option(
        "Interfaces", INTERFACES, (), "Capture what comes in here as outbound (docker0, a KubeVirt bridge)."
    )
    ip_family: Literal["auto", "v4", "v6", "dual"] = _option(
        "IP families",
        _one_of("auto", "v4", "v6", "dual"),
        "auto",
        "The families to capture; auto: those the kernel has.",
    )
    uncovered_family: Literal["block", "bypass"] = _option(
        "IP families", _one_of("block", "bypass"), "block", "What becomes of traffic of a family that is not captured."
    )
    conntrack_timeouts: bool = _option(
        "Kernel",
        SWITCH,
        True,
        "Forget reset connections at once, so that a reused source port is captured; docs/decisions/0002.",
    )
    drop_invalid: bool = _option("Kernel", SWITCH, False, "Drop packets that conntrack calls invalid.")
    log_rules: bool = _option("Kernel", SWITCH, False, "Log each captured or dropped connection in the kernel's log.")
    tproxy_mark: Mark = _option(
        "Kernel", MARK, Mark(1337, 0xFFF), "Mark for TPROXY's policy route; this one and the next two values are used."
    )
    tproxy_table: int = _option("Kernel", TABLE, 133, "Routing table for TPROXY.")
    backend: Backend = _option(
        "Kernel", _one_of("auto", "nft", "iptables-nft", "iptables-legacy", "libiptc"), "auto", "What writes the rules."
    )

    def __post_init__(self) -> None:
        problems = find_contradictions(self)
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
    for field in dataclasses.fields(Config)
)
FIELD: dict[str, Field] = {field.name: field for field in FIELDS}


def find_contradictions(config: Config) -> list[Problem]:
    """Values that are right one by one and wrong together; empty when there are none."""
    return [
        *_equal_ports(config),
        *_uncovered_cidrs(config),
        *_identity(config),
        *_marks(config),
        *_interfaces(config),
        *_connect(config),
    ]


def _problem(config: Config, name: str, expected: str) -> Problem:
    return Problem(FIELD[name].flag, FIELD[name].kind.show(getattr(config, name)), expected)


def _equal_ports(config: Config) -> list[Problem]:
    names = ("outbound_port", "inbound_port", "dns_port", "tunnel_port", "probe_port")
    taken: dict[int, str] = {}
    problems = []
    for name in names:
        port = getattr(config, name)
        if port in taken:
            problems.append(_problem(config, name, f"is {FIELD[taken[port]].flag} too; the proxy's ports must differ"))
        taken.setdefault(port, name)
    return problems


def _uncovered_cidrs(config: Config) -> list[Problem]:
    names = ("exclude_inbound_cidrs", "include_outbound_cidrs", "exclude_outbound_cidrs")
    return [
        Problem(FIELD[name].flag, str(network), f"an IP{Family.of(network).value} CIDR with --ip-family {config.ip_family}")
        for name in names
        for network in getattr(config, name)
        if config.family_excluded(Family.of(network))
    ]


def _identity(config: Config) -> list[Problem]:
    problems = []
    if not (config.proxy_uid or config.proxy_gid or config.proxy_mark or config.proxy_cgroup):
        expected = "the proxy needs an identity, or its own traffic is captured again: a uid, a gid, a mark or a cgroup"
        problems.append(_problem(config, "proxy_uid", expected))
    if config.proxy_cgroup and config.backend not in ("auto", "nft"):
        problems.append(_problem(config, "proxy_cgroup", "only the nft backend matches cgroups; give --backend nft"))
    return problems


def _marks(config: Config) -> list[Problem]:
    mark = config.tproxy_mark
    last = mark.value + 2
    if last > mark.mask or last & ~mark.mask or (mark.value + 1) & ~mark.mask:
        return [
            _problem(config, "tproxy_mark", "the mask has no room for the mark and the two values after it; 0x539/0xfff has")
        ]
    if config.proxy_mark is None:
        return []
    own = config.proxy_mark
    if any(own.value & mark.mask == value or own.matches(value) for value in range(mark.value, last + 1)):
        return [_problem(config, "proxy_mark", f"can't be told from --tproxy-mark {mark} or the two values after it")]
    return []


def _interfaces(config: Config) -> list[Problem]:
    both = [name for name in config.virtual_interfaces if name in config.exclude_interfaces]
    problems = [Problem("--virtual-interfaces", name, "is in --exclude-interfaces too") for name in both]
    if "lo" in config.virtual_interfaces:
        problems.append(Problem("--virtual-interfaces", "lo", "the loopback interface is no virtual interface"))
    return problems


def _connect(config: Config) -> list[Problem]:
    """At connect() there is no packet yet: no interface, nothing that others send, nothing to log."""
    if config.outbound != "connect":
        return []
    reasons = {
        "exclude_interfaces": "--outbound connect decides before the route is known; exclude CIDRs, or use redirect",
        "virtual_interfaces": "what comes in from there is connected elsewhere; --outbound redirect or tproxy captures it",
        "log_rules": "--outbound connect has no packet to log; --outbound redirect or tproxy has",
    }
    return [_problem(config, name, reason) for name, reason in reasons.items() if getattr(config, name)]


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
