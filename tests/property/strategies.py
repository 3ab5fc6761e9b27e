"""Hypothesis strategies for Config, HostFacts and Packet, from pools so small that packets meet rules.

All addresses, interfaces and ids can be set up in a network namespace: the kernel-against-walk tests draw from here too.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from hypothesis import strategies as st

from interceptor.config import FIELD, FIELDS, Config
from interceptor.plan.model import HostFacts, PolicyRoute
from interceptor.plan.walk import Packet
from interceptor.proxy_options import PROXY_GROUPS
from interceptor.values import (
    Address,
    Family,
    IdRange,
    Mark,
    Network,
    PortRange,
    Proto,
    UidRule,
    contains,
    merge,
    parse_cidrs,
)

PORTS = (22, 53, 80, 443, 8080, 8443)
IDS = (0, 1000, 1001, 1337, 1338, 70000)
INTERFACES = ("eth0", "eth1", "docker0")
OWN: dict[Family, Address] = {Family.V4: ipaddress.ip_address("10.1.0.2"), Family.V6: ipaddress.ip_address("fd00:1::2")}
LOOPBACK: dict[Family, Address] = {Family.V4: ipaddress.ip_address("127.0.0.1"), Family.V6: ipaddress.ip_address("::1")}
LEG: dict[Family, Address] = {Family.V4: ipaddress.ip_address("127.0.0.6"), Family.V6: ipaddress.ip_address("::6")}
RESOLVER: dict[Family, Address] = {Family.V4: ipaddress.ip_address("10.1.0.53"), Family.V6: ipaddress.ip_address("fd00:1::53")}
REMOTE: dict[Family, tuple[Address, ...]] = {
    Family.V4: tuple(map(ipaddress.ip_address, ("10.1.0.1", "10.1.0.77", "10.2.0.1", "192.0.2.9", "198.51.100.7"))),
    Family.V6: tuple(map(ipaddress.ip_address, ("fd00:1::1", "fd00:1::77", "fd00:2::1", "2001:db8::9", "2001:db8:7::1"))),
}
CIDRS: dict[Family, tuple[Network, ...]] = {
    Family.V4: parse_cidrs("10.1.0.77,10.2.0.0/16,192.0.2.0/24,198.51.100.7/32"),
    Family.V6: parse_cidrs("fd00:1::77,fd00:2::/32,2001:db8::/48,2001:db8:7::1"),
}
LOCAL = frozenset((*OWN.values(), *LOOPBACK.values(), *LEG.values()))


# Some of them are well-formed by chance: of characters that mean something, and any others.
malformed_texts = st.text(alphabet="0123456789-,:;*/.xaf ", max_size=12) | st.text()


def _tuples(elements: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(elements, min_size=1, max_size=size, unique=True).map(tuple)


port_ranges = st.one_of(
    st.sampled_from(PORTS).map(lambda port: PortRange(port, port)),
    st.sampled_from((PortRange(79, 90), PortRange(400, 500), PortRange(8000, 9000), PortRange(1, 65535))),
)
ports = _tuples(port_ranges).map(merge)
# More than the fifteen that one multiport match holds.
many_ports = st.just(merge(PortRange(port, port) for port in (*range(1001, 1041, 2), *PORTS[2:])))
id_ranges = st.one_of(st.sampled_from(IDS).map(lambda number: IdRange(number, number)), st.just(IdRange(1000, 1010)))
ids = _tuples(id_ranges).map(merge)
marks = st.just(Mark(0x10000, 0x10000))
uid_rules = st.builds(UidRule, st.sampled_from(((Proto.TCP,), (Proto.UDP,), tuple(Proto))), st.one_of(st.just(()), ports), ids)


def _cidrs(families: tuple[Family, ...]) -> st.SearchStrategy[tuple[Network, ...]]:
    return _tuples(st.sampled_from([network for family in families for network in CIDRS[family]])).map(
        lambda found: parse_cidrs(",".join(map(str, found)))
    )


def _by_choice(name: str) -> st.SearchStrategy[Any]:
    kind = FIELD[name].kind
    return st.sampled_from(kind.choices).map(lambda text: text == "true" if text in ("true", "false") else text)


NEED_PACKETS = ("exclude_interfaces", "virtual_interfaces", "log_rules", "before_proxy")
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "outbound_port": st.just(15101),
    "inbound_port": st.just(15106),
    "dns_port": st.just(15153),
    "tunnel_port": st.just(8443),
    "probe_port": st.just(8080),
    "admin_port": st.sampled_from((None, 8090)),
    "proxy_uid": ids,
    "proxy_gid": st.one_of(st.just(()), ids),
    "proxy_mark": marks,
    "proxy_cgroup": st.just("interceptor/proxy"),
    "capture_cgroup": st.just("interceptor/pod"),
    "include_uids": ids,
    "exclude_uids": ids,
    "include_gids": ids,
    "exclude_gids": ids,
    "exclude_outbound_for_uids": _tuples(uid_rules, 2),
    "exclude_interfaces": st.just(("eth1",)),
    "virtual_interfaces": st.just(("docker0",)),
    "tproxy_mark": st.sampled_from((Mark(16, 0xFF), Mark(0x100, 0xFFFF))),
    "tproxy_table": st.just(1337),
    "backend": st.just("auto"),
}
VALUES |= {
    f"{verb}_{way}_ports": st.one_of(ports, many_ports) for verb in ("include", "exclude") for way in ("inbound", "outbound")
}


durations = st.sampled_from((0.001, 0.25, 1.0, 90.0, 3600.0))
counts = st.sampled_from((None, 1, 1000))


def _proxy_options(families: tuple[Family, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Values for ProxyOptions, which no plan depends on."""
    nobody = st.just({"upstream_proxy_protocol": "off"})
    somebody = st.fixed_dictionaries({"upstream_proxy_protocol": st.sampled_from(("v1", "v2"))})
    ports = st.tuples(somebody, port_ranges.map(lambda found: {"upstream_proxy_protocol_ports": (found,)}))
    cidrs = st.tuples(somebody, _cidrs(families).filter(bool).map(lambda found: {"upstream_proxy_protocol_cidrs": found}))
    others = {
        "workers": st.sampled_from((None, 1, 4)),
        "relay": st.sampled_from(("auto", "splice", "copy")),
        "max_connections": counts,
        "max_connections_per_client": counts,
        "connect_timeout": durations,
        "idle_timeout": st.none() | durations,
        "keepalive": st.none() | durations,
        "udp_idle_timeout": durations,
        "drain_deadline": st.just(0.0) | durations,
        "peek": st.sampled_from(((), ("sni",), ("host", "sni"))),
    }
    header = st.one_of(nobody, ports.map(lambda both: both[0] | both[1]), cidrs.map(lambda both: both[0] | both[1]))
    return st.tuples(header, st.fixed_dictionaries({}, optional=others)).map(lambda both: both[0] | both[1])


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> Config:
    """Valid Configs; `fixed` fields have the given values. Most fields keep their default, as users' do."""
    family = fixed.get("ip_family") or draw(st.sampled_from(("auto", "v4", "v6", "dual")))
    families = {"v4": (Family.V4,), "v6": (Family.V6,)}.get(family, tuple(Family))
    values: dict[str, Any] = {"ip_family": family}
    if draw(st.integers(0, 3)) == 0:
        values |= draw(_proxy_options(families))
    for row in FIELDS:
        if row.name in fixed or row.name == "ip_family" or row.group in PROXY_GROUPS:
            continue
        if row.kind.choices and row.name != "backend":
            values[row.name] = draw(_by_choice(row.name))
        elif draw(st.integers(0, 3)) == 0:
            values[row.name] = draw(_cidrs(families) if row.name.endswith("cidrs") else VALUES[row.name])
    if (values | fixed).get("outbound") == "connect":
        # Nothing of these is known when a socket is connected: it refuses them.
        if any(fixed.get(name, FIELD[name].default) != FIELD[name].default for name in NEED_PACKETS):
            values["outbound"] = "redirect"
        else:
            values |= {name: FIELD[name].default for name in NEED_PACKETS}
    return Config(**(values | fixed))


def facts(config: Config) -> st.SearchStrategy[HostFacts]:
    """Facts of hosts on which `config` is possible."""
    both = tuple(Family)
    kernels = [both, (Family.V4,)] if config.ip_family in ("auto", "v4") else [both]
    resolvers = tuple(network for address in RESOLVER.values() for network in parse_cidrs(str(address)))
    own = tuple(network for address in OWN.values() for network in parse_cidrs(str(address)))
    marks = (config.tproxy_mark, Mark(0x20, 0xFF), Mark(0x300, 0xFFFF))
    earlier = st.lists(st.sampled_from([PolicyRoute(family, mark, 1337) for mark in marks for family in Family]), unique=True)
    return st.builds(
        HostFacts,
        st.sampled_from(kernels),
        st.sampled_from(((), resolvers)),
        st.booleans(),
        own_addresses=st.just(own),
        source=st.sampled_from([None, OWN[Family.V4]]),
        earlier_routes=earlier.map(tuple),
    )


@st.composite
def outbound_packets(draw: st.DrawFn, config: Config | None = None, families: tuple[Family, ...] = tuple(Family)) -> Packet:
    """First packets of connections that local processes open."""
    family = draw(st.sampled_from(families))
    dst = draw(st.sampled_from((*REMOTE[family], RESOLVER[family], OWN[family], LOOPBACK[family])))
    to_itself = dst in LOCAL
    src = dst if to_itself else OWN[family]
    if to_itself and draw(st.integers(0, 3)) == 0:
        src = draw(st.sampled_from((LEG[family], REMOTE[family][0])))
    return Packet(
        proto=draw(st.sampled_from(Proto)),
        src=src,
        dst=dst,
        dport=draw(_dports(config)),
        uid=draw(st.sampled_from(IDS)),
        gid=draw(st.sampled_from(IDS)),
        out_interface="lo" if to_itself else draw(st.sampled_from(INTERFACES)),
        mark=draw(st.sampled_from((0, 0, 0x10000))),
        cgroup=draw(st.sampled_from((None, "interceptor/proxy"))),
        local=LOCAL,
    )


@st.composite
def inbound_packets(draw: st.DrawFn, config: Config | None = None, families: tuple[Family, ...] = tuple(Family)) -> Packet:
    """First packets of connections that come in from other hosts, or from docker0 on their way through."""
    family = draw(st.sampled_from(families))
    interface = draw(st.sampled_from(INTERFACES))
    through = interface == "docker0" and draw(st.booleans())
    return Packet(
        proto=draw(st.sampled_from(Proto)),
        src=draw(st.sampled_from(REMOTE[family])),
        dst=draw(st.sampled_from((*REMOTE[family], RESOLVER[family]))) if through else OWN[family],
        dport=draw(_dports(config)),
        in_interface=interface,
        local=LOCAL,
    )


def _dports(config: Config | None) -> st.SearchStrategy[int]:
    config = config or Config()
    own = (config.outbound_port, config.inbound_port, config.dns_port, config.tunnel_port, config.probe_port, 15020)
    return st.sampled_from((*PORTS, *own, 1003, 60000))


def announces(config: Config, packet: Packet) -> bool:
    """Whether the proxy says with it that it is ready."""
    is_to_us = packet.proto is Proto.UDP and packet.dport == config.probe_port and packet.dst in LOCAL
    return config.before_proxy == "bypass" and is_to_us and packet.in_interface is None and is_proxys(config, packet)


def is_proxys(config: Config, packet: Packet) -> bool:
    """Whether the packet carries the proxy's identity."""
    return (
        (packet.uid is not None and contains(config.proxy_uid, packet.uid))
        or (packet.gid is not None and contains(config.proxy_gid, packet.gid))
        or (config.proxy_mark is not None and config.proxy_mark.matches(packet.mark))
        or (config.proxy_cgroup is not None and config.proxy_cgroup == packet.cgroup)
    )
