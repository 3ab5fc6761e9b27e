"""From a Config to ProxySettings: which ports to listen on, in which families, and what the proxy must refuse. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from interceptor.config import Config
from interceptor.proxy.settings import KINDS, HeaderFor, Listener, ListenFamily, ProxySettings


def settings(
    config: Config,
    families: tuple[ListenFamily, ...],
    *,
    resolvers: tuple[str, ...] = (),
    run_as: tuple[int, int] | None = None,
) -> ProxySettings:
    """The settings of a proxy for what `config` captures, with one listener of each kind for each of `families`."""
    own_ports = (config.outbound_port, config.inbound_port, config.dns_port, config.tunnel_port)
    return ProxySettings(
        listeners=tuple(_tcp_listeners(config, families)),
        udp_listeners=tuple(_udp_listeners(config, families)),
        own_ports=frozenset((*own_ports, config.admin_port) if config.admin_port else own_ports),
        probe_port=config.probe_port,
        upstream_mark=config.proxy_mark.value if config.proxy_mark else None,
        original_source=config.original_source,
        run_as=run_as,
        dns_port=config.dns_port if config.dns != "off" else None,
        dns_families=families,
        resolvers=tuple(map(str, config.dns_upstream)) or resolvers,
        dns_parallel=config.dns_parallel,
        dns_cache_size=config.dns_cache_size or 0,
        virtual_interfaces=config.virtual_interfaces,
        connect_timeout_s=config.connect_timeout,
        idle_timeout_s=config.idle_timeout,
        udp_idle_s=config.udp_idle_timeout,
        drain_deadline_s=config.drain_deadline,
        relay=config.relay,
        packet_pins=config.packet_pins,
        max_connections=config.max_connections,
        max_connections_per_client=config.max_connections_per_client,
        keepalive_s=config.keepalive,
        peek=frozenset(kind for kind in KINDS if kind in config.peek),
        header=_header(config),
        admin_port=config.admin_port,
    )


def _header(config: Config) -> HeaderFor | None:
    if config.upstream_proxy_protocol == "off":
        return None
    return HeaderFor(config.upstream_proxy_protocol, config.upstream_proxy_protocol_ports, config.upstream_proxy_protocol_cidrs)


def _tcp_listeners(config: Config, families: Iterable[ListenFamily]) -> Iterator[Listener]:
    for family in families:
        if config.outbound != "off":
            yield Listener("outbound", config.outbound, config.outbound_port, family)
        if config.inbound != "off":
            yield Listener("inbound", config.inbound, config.inbound_port, family)


def _udp_listeners(config: Config, families: Iterable[ListenFamily]) -> Iterator[Listener]:
    for family in families if config.udp == "tproxy" else ():
        if config.outbound != "off":
            yield Listener("outbound", "tproxy", config.outbound_port, family)
        if config.inbound != "off":
            yield Listener("inbound", "tproxy", config.inbound_port, family)
