"""What `run` fixes in a Config, and the ProxySettings that go with it. Pure."""

from __future__ import annotations

from dataclasses import replace

from interceptor.config import Config
from interceptor.plan.model import HostFacts, Plan
from interceptor.proxy.settings import Listener, ListenFamily, ProxySettings
from interceptor.sources import Resolved
from interceptor.values import Family, Mark

# In the namespace nothing is the proxy's own: it dials from outside. A rule needs some identity, so: a mark nobody sets.
NOBODYS_MARK = Mark(0x69746300)


def run_config(resolved: Resolved) -> Config:
    """The Config for the command's namespace: outbound only, DNS unless told otherwise, and no traffic of the proxy's."""
    config = resolved.config
    return replace(
        config,
        dns="all" if resolved.origin["dns"] == "default" else config.dns,
        inbound="off",
        original_source=False,
        proxy_uid=(),
        proxy_gid=(),
        proxy_mark=NOBODYS_MARK,
        proxy_cgroup=None,
    )


def proxy_settings(config: Config, plan: Plan, facts: HostFacts) -> ProxySettings:
    """The proxy's half of `config`: it listens inside, and asks the host's own resolvers from outside."""
    family: ListenFamily = "dual" if Family.V6 in plan.families else "v4"
    ports = (config.outbound_port, config.inbound_port, config.dns_port, config.tunnel_port)
    tcp = (Listener("outbound", config.outbound, config.outbound_port, family),) if config.outbound != "off" else ()
    udp = (Listener("outbound", "tproxy", config.outbound_port, family),) if config.udp == "tproxy" else ()
    return ProxySettings(
        listeners=tcp,
        own_ports=frozenset(ports),
        probe_port=config.probe_port,
        udp_listeners=udp,
        dns_port=config.dns_port if config.dns != "off" else None,
        resolvers=tuple(str(resolver.network_address) for resolver in facts.resolvers),
    )
