"""The outbound half of the plan: what local processes (and virtual interfaces) send. One short function a concern.

The order: excluded interface, proxy identity and self-call, excluded uid/gid, excluded port, excluded CIDR, DNS, loopback,
included ports, CIDRs, uids and gids. An exclusion always wins over an inclusion.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from interceptor.config import Config
from interceptor.plan.model import Announce, Chain, Goto, Jump, Match, Return, Rule, ShortTimeouts, Table, TimeoutPolicy, Zone
from interceptor.values import Family, Network, PortRange, Proto

DNS_PORTS = (PortRange(53, 53),)
LOOPBACK: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
INBOUND_SOURCE: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.6/32"), ipaddress.ip_network("::6/128"))
MULTICAST: tuple[Network, ...] = tuple(ipaddress.ip_network(text) for text in ("224.0.0.0/4", "255.255.255.255/32", "ff00::/8"))


@dataclass(frozen=True, slots=True)
class Capturing:
    """What one table's outbound chain captures, and where captured traffic goes."""

    table: Table
    protos: tuple[Proto, ...]  # captured by the include rules
    to_proxy: str  # chain; its rules end the decision
    to_dns: str | None = None  # chain; None: DNS is not decided in this table
    skip_dns: bool = False  # DNS is captured in another table: leave it alone here
    resolvers: tuple[Network, ...] | None = None  # None: any server

    @property
    def dns_protos(self) -> tuple[Proto, ...]:
        return tuple(Proto) if self.to_dns is not None or self.skip_dns else ()

    @property
    def all_protos(self) -> tuple[Proto, ...]:
        return tuple(proto for proto in Proto if proto in self.protos or proto in self.dns_protos)


def identities(config: Config) -> tuple[tuple[Match, str], ...]:
    """A match for each way to know the proxy's own traffic, and the option behind it. They are alternatives."""
    found: list[tuple[Match, str]] = []
    if config.proxy_uid:
        found.append((Match(uids=config.proxy_uid), "--proxy-uid"))
    if config.proxy_gid:
        found.append((Match(gids=config.proxy_gid), "--proxy-gid"))
    if config.proxy_mark:
        found.append((Match(mark=config.proxy_mark), "--proxy-mark"))
    if config.proxy_cgroup:
        found.append((Match(cgroup=config.proxy_cgroup), "--proxy-cgroup"))
    return tuple(found)


def local_chains(config: Config, capturing: Capturing, proxy_chain: str, name: str) -> Iterator[Chain]:
    """The decision about what this namespace's own processes send."""
    include = list(_include_stages(config, capturing, name, by_owner=(config.include_uids, config.include_gids)))
    rules = [
        *excluded_interfaces(config, outgoing=True),
        *_proxy_identity(config, proxy_chain),
        *_before_proxy(config),
        *_excluded_owners(config, capturing),
        *_excluded_destinations(config, capturing),
        *_dns(capturing),
        Rule(_to_itself(capturing), Return(), "loopback and this pod's own addresses stay direct", "built in"),
        *_multicast(capturing),
        *include[0].rules,
    ]
    yield Chain(capturing.table, name, tuple(rules))
    yield from include[1:]


def _to_itself(capturing: Capturing) -> Match:
    # A socket that is being connected has no route yet.
    return Match(dst_is_local=True) if capturing.table is Table.CONNECT else Match(out_interface="lo")


def virtual_chains(config: Config, capturing: Capturing, name: str) -> Iterator[Chain]:
    """The decision about what comes in from a virtual interface: as outbound, but nobody here owns it."""
    include = list(_include_stages(config, capturing, name, by_owner=((), ())))
    rules = [
        *_before_proxy(config),
        *_excluded_destinations(config, capturing),
        *_dns(capturing),
        Rule(Match(dst_is_local=True), Return(), "this pod's own addresses stay direct", "built in"),
        *_multicast(capturing),
        *include[0].rules,
    ]
    yield Chain(capturing.table, name, tuple(rules))
    yield from include[1:]


def excluded_interfaces(config: Config, *, outgoing: bool) -> Iterator[Rule]:
    """Interfaces that are left alone."""
    for interface in config.exclude_interfaces:
        match = Match(out_interface=interface) if outgoing else Match(in_interface=interface)
        yield Rule(match, Return(), f"interface {interface} is excluded", "--exclude-interfaces")


def _proxy_identity(config: Config, proxy_chain: str) -> Iterator[Rule]:
    for match, option in identities(config):
        yield Rule(match, Goto(proxy_chain), "the proxy's own traffic", option)


def _before_proxy(config: Config) -> Iterator[Rule]:
    if config.before_proxy == "bypass":
        yield Rule(Match(announced=False), Return(), "the proxy is not ready yet", "--before-proxy bypass")


def announcements(config: Config, asking: tuple[Family, ...]) -> Iterator[Rule]:
    """The proxy's datagram to its own host that says it is ready. By its identity: nobody else's counts.

    In all families with rules that are `asking` for it: iptables notes it for each.
    """
    port = PortRange(config.probe_port, config.probe_port)
    for family in (None,) if len(asking) == len(Family) else asking:
        for match, _ in identities(config):
            to_us = replace(match, family=family, proto=Proto.UDP, dports=(port,), dst_is_local=True)
            yield Rule(to_us, Announce(), "the proxy is ready", "--before-proxy bypass")


def _excluded_owners(config: Config, capturing: Capturing) -> Iterator[Rule]:
    if config.exclude_uids:
        yield Rule(Match(uids=config.exclude_uids), Return(), "this user is excluded", "--exclude-uids")
    if config.exclude_gids:
        yield Rule(Match(gids=config.exclude_gids), Return(), "this group is excluded", "--exclude-gids")
    for match in uid_rule_matches(config, capturing.all_protos):
        yield Rule(match, Return(), "this user is excluded for these ports", "--exclude-outbound-for-uids")


def uid_rule_matches(config: Config, protos: Iterable[Proto]) -> Iterator[Match]:
    """One match for each protocol of each `--exclude-outbound-for-uids` rule."""
    for exclusion in config.exclude_outbound_for_uids:
        for proto in protos:
            if proto in exclusion.protos:
                yield Match(proto=proto, dports=exclusion.ports, uids=exclusion.uids)


def _excluded_destinations(config: Config, capturing: Capturing) -> Iterator[Rule]:
    for proto in capturing.all_protos if config.exclude_outbound_ports else ():
        match = Match(proto=proto, dports=config.exclude_outbound_ports)
        yield Rule(match, Return(), "this port is excluded", "--exclude-outbound-ports")
    if config.exclude_outbound_cidrs:
        match = Match(dst=config.exclude_outbound_cidrs)
        yield Rule(match, Return(), "this destination is excluded", "--exclude-outbound-cidrs")


def _dns(capturing: Capturing) -> Iterator[Rule]:
    if capturing.resolvers is not None and not capturing.resolvers:
        return
    for proto in capturing.dns_protos:
        match = Match(proto=proto, dports=DNS_PORTS, dst=capturing.resolvers or ())
        if capturing.to_dns is not None:
            yield Rule(match, Goto(capturing.to_dns), "DNS goes to the proxy", "--dns")
        else:
            yield Rule(match, Return(), "DNS is captured by NAT", "--dns")


def _multicast(capturing: Capturing) -> Iterator[Rule]:
    if Proto.UDP in capturing.protos:
        yield Rule(Match(proto=Proto.UDP, dst=MULTICAST), Return(), "multicast and broadcast have no one proxy", "built in")


def _include_stages(
    config: Config, capturing: Capturing, name: str, *, by_owner: tuple[tuple[object, ...], tuple[object, ...]]
) -> Iterator[Chain]:
    """One chain a given include list, each entered only by what the lists before let through: together they mean AND.

    The first chain's rules are appended to the decision chain itself; without any list they go to the proxy at once.
    """
    if not capturing.protos:
        yield Chain(capturing.table, f"{name}_1", ())
        return
    uids, gids = by_owner
    stages: list[tuple[tuple[Match, ...], str]] = []
    if config.include_outbound_ports:
        ports = tuple(Match(proto=proto, dports=config.include_outbound_ports) for proto in capturing.protos)
        stages.append((ports, "--include-outbound-ports"))
    if config.include_outbound_cidrs:
        stages.append(((Match(dst=config.include_outbound_cidrs),), "--include-outbound-cidrs"))
    if uids:
        stages.append(((Match(uids=config.include_uids),), "--include-uids"))
    if gids:
        stages.append(((Match(gids=config.include_gids),), "--include-gids"))
    everything = tuple(Match(proto=proto) for proto in capturing.protos)
    if not stages:
        stages.append((everything, ""))
    for number, (matches, option) in enumerate(stages):
        last = number == len(stages) - 1
        target = capturing.to_proxy if last else f"{name}_{number + 2}"
        why = "captured outbound" if last else "included so far"
        # A stage without the protocol must not let a protocol through that this table does not capture.
        complete = (
            matches
            if matches[:1] and matches[0].proto
            else tuple(replace(match, proto=proto) for match in matches for proto in capturing.protos)
        )
        rules = tuple(Rule(match, Goto(target), why, option or _mechanism(config, match)) for match in complete)
        yield Chain(capturing.table, f"{name}_{number + 1}", rules)


def _mechanism(config: Config, match: Match) -> str:
    return "--udp tproxy" if match.proto is Proto.UDP else f"--outbound {config.outbound}"


def zone_rules(config: Config) -> tuple[Rule, ...]:
    """The proxy's own UDP gets a conntrack zone, or a query from a port that it used goes around it (istio#33469).

    So does what goes direct before the proxy is ready: what is sent later from the same port has another entry.
    """
    rules = [
        Rule(replace(match, proto=Proto.UDP), Zone(1), "the proxy's own UDP has conntrack entries of its own", option)
        for match, option in identities(config)
    ]
    if config.before_proxy == "bypass":
        early = Match(proto=Proto.UDP, announced=False)
        rules.append(Rule(early, Zone(2), "before the proxy is ready: decided anew afterwards", "--before-proxy bypass"))
    return tuple(rules)


def timeout_chains(config: Config, name: str) -> Iterator[Chain]:
    """TCP must leave no conntrack entry that the next connection from the same port could take over. See TIMEOUTS."""
    tcp = Match(proto=Proto.TCP)
    uncaptured, captured = Goto("UNCAPTURED"), Goto("CAPTURED")
    why = "not captured, because of its owner"
    rules = [Rule(replace(match, proto=Proto.TCP), uncaptured, why, option) for match, option in identities(config)]
    if config.before_proxy == "bypass":
        early = replace(tcp, syn=True, announced=False)
        rules.append(Rule(early, uncaptured, "not captured, before the proxy is ready", "--before-proxy bypass"))
    if config.exclude_uids:
        rules.append(Rule(replace(tcp, uids=config.exclude_uids), uncaptured, why, "--exclude-uids"))
    if config.exclude_gids:
        rules.append(Rule(replace(tcp, gids=config.exclude_gids), uncaptured, why, "--exclude-gids"))
    rules += [Rule(match, uncaptured, why, "--exclude-outbound-for-uids") for match in uid_rule_matches(config, (Proto.TCP,))]
    owners = [(replace(tcp, uids=config.include_uids), "--include-uids")] if config.include_uids else []
    owners += [(replace(tcp, gids=config.include_gids), "--include-gids")] if config.include_gids else []
    chain_name = name
    for number, (match, option) in enumerate(owners, start=2):
        rules.append(Rule(match, Goto(f"{name}_{number}"), "included so far", option))
        rules.append(Rule(tcp, uncaptured, why, option))
        yield Chain(Table.TIMEOUT, chain_name, tuple(rules))
        rules, chain_name = [], f"{name}_{number}"
    yield Chain(Table.TIMEOUT, chain_name, (*rules, Rule(tcp, captured, "captured, or left alone for everyone", "built in")))
    for policy in TimeoutPolicy:
        forget = Rule(tcp, ShortTimeouts(policy), "after a reset its conntrack entry goes at once", "--conntrack-timeouts")
        yield Chain(Table.TIMEOUT, policy.name, (forget,))


def self_call_rules(inbound_chain: str) -> tuple[Rule, ...]:
    """What the proxy sends over lo: to its own pod's address it is inbound traffic again, else direct."""
    rules = [
        Rule(Match(src=INBOUND_SOURCE), Return(), "the proxy's inbound leg to the application", "built in"),
        Rule(Match(dst=LOOPBACK), Return(), "the proxy to loopback stays direct", "built in"),
        Rule(
            Match(src_is_local=False),
            Return(),
            "the proxy's inbound leg, from the client's own address",
            "--original-source",
        ),
    ]
    match = Match(proto=Proto.TCP, syn=True, out_interface="lo")
    rules.append(Rule(match, Jump(inbound_chain), "the proxy calls its own pod: inbound", "--inbound"))
    return tuple(rules)
