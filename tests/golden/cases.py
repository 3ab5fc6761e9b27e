"""Named Configs whose rendered text is kept in this directory. Together they give every option a value of its own."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interceptor.config import FIELD, Config, Names
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts, Plan, PolicyRoute
from interceptor.render import connect_policy, iptables, nft
from interceptor.values import Family, Mark

HERE = Path(__file__).parent
HOST = HostFacts(
    resolvers=(ipaddress.ip_network("10.96.0.10"), ipaddress.ip_network("fd00:96::a")),
    own_addresses=(ipaddress.ip_network("10.1.0.2"), ipaddress.ip_network("fd00:1::2")),
    source=ipaddress.ip_address("10.1.0.2"),
)
V4_HOST = HostFacts(kernel_families=(Family.V4,), resolvers=HOST.resolvers[:1])
AFTER_TPROXY = HostFacts(earlier_routes=tuple(PolicyRoute(family, Mark(0x539, 0xFFF), 133) for family in Family))
_NAMES = Names(uid={}.__getitem__, gid={}.__getitem__)


def _config(**texts: str) -> Config:
    values: dict[str, Any] = {name: FIELD[name].kind.parse(text, _NAMES) for name, text in texts.items()}
    return Config(**values)


CASES: dict[str, Config] = {
    "default": _config(),
    "outbound-only": _config(inbound="off"),
    "inbound-only": _config(outbound="off"),
    "nothing": _config(inbound="off", outbound="off"),
    "own-ports": _config(
        outbound_port="4140",
        inbound_port="4143",
        dns_port="4153",
        tunnel_port="4144",
        probe_port="4191",
        admin_port="4192",
        dns="all",
    ),
    "no-admin": _config(admin_port="off", inbound="tproxy"),
    "proxy-identities": _config(
        proxy_uid="1337,2102,70000-70010", proxy_gid="1337,2102", proxy_mark="0x10000/0x10000", dns="all", udp="tproxy"
    ),
    "proxy-cgroup": _config(proxy_uid="", proxy_gid="", proxy_cgroup="kubepods/pod1/proxy", backend="nft"),
    "ports": _config(
        include_inbound_ports="80,443,8000-9000",
        exclude_inbound_ports="22,9090",
        include_outbound_ports="80,443",
        exclude_outbound_ports="25,3306,6000-6100",
    ),
    "many-ports": _config(exclude_outbound_ports=",".join(str(port) for port in range(1001, 1041, 2)) + ",2000-2010"),
    "cidrs": _config(
        exclude_inbound_cidrs="10.9.0.0/16,192.0.2.1,fd00:9::/32",
        include_outbound_cidrs="10.0.0.0/8,fd00::/8",
        exclude_outbound_cidrs="10.1.0.0/16,169.254.169.254,fd00:1::/32",
    ),
    "cidrs-of-one-family": _config(include_outbound_cidrs="10.0.0.0/8", exclude_inbound_cidrs="fd00::/8"),
    "include-owners": _config(include_uids="1000-1010,5000", include_gids="2000", include_outbound_ports="80,443"),
    "exclude-owners": _config(exclude_uids="0,65534", exclude_gids="3000-3010"),
    "uid-rules": _config(exclude_outbound_for_uids="tcp:80,443:1000-1010;udp:53:65534;4000", dns="all", udp="tproxy"),
    "interfaces": _config(exclude_interfaces="net1,net2", virtual_interfaces="docker0"),
    "dns-resolv-conf": _config(dns="resolv-conf"),
    "dns-all": _config(dns="all"),
    "dns-alone": _config(outbound="off", inbound="off", dns="all"),
    "tproxy": _config(inbound="tproxy", outbound="tproxy", tproxy_mark="0x400/0xfff", tproxy_table="400"),
    "tproxy-inbound": _config(inbound="tproxy", virtual_interfaces="docker0"),
    "tproxy-outbound": _config(outbound="tproxy", dns="all", virtual_interfaces="docker0"),
    "connect": _config(outbound="connect", capture_cgroup="kubepods/pod1"),
    "connect-lists": _config(
        outbound="connect",
        inbound="off",
        dns="resolv-conf",
        proxy_mark="0x10000/0x10000",
        ip_family="v4",
        include_outbound_ports="80,443",
        include_uids="1000-1010",
        exclude_outbound_cidrs="10.0.0.0/8,10.96.0.0/12",
        exclude_outbound_for_uids="tcp:80,443:1000-1010",
    ),
    "udp": _config(udp="tproxy"),
    "original-source": _config(original_source="true"),
    "original-source-udp": _config(original_source="true", udp="tproxy"),
    "v4-others-blocked": _config(ip_family="v4", dns="all", udp="tproxy", virtual_interfaces="docker0"),
    "v6-others-bypass": _config(ip_family="v6", uncovered_family="bypass"),
    "redirect-after-tproxy": _config(),
    "dual": _config(ip_family="dual"),
    "kernel-without-v6": _config(),
    "before-proxy": _config(before_proxy="bypass", dns="all"),
    "before-proxy-tproxy": _config(before_proxy="bypass", outbound="tproxy", udp="tproxy", virtual_interfaces="docker0"),
    "no-conntrack-timeouts": _config(conntrack_timeouts="false"),
    "drop-invalid-and-log": _config(drop_invalid="true", log_rules="true", outbound="tproxy", backend="iptables-nft"),
}


def plan(name: str) -> Plan:
    """The plan of a case."""
    return build_plan(CASES[name], {"kernel-without-v6": V4_HOST, "redirect-after-tproxy": AFTER_TPROXY}.get(name, HOST))


def rendered(name: str) -> Iterator[tuple[Path, str]]:
    """The case's golden files and what they should hold."""
    built = plan(name)
    yield HERE / f"{name}.nft", nft.script(built)
    if built.connect is not None:
        yield HERE / f"{name}.connect", connect_policy.document(built.connect)
    if CASES[name].proxy_cgroup is None:
        for family in Family:
            yield HERE / f"{name}.{family.value}.restore", iptables.restore(iptables.rules(built, family), {})
