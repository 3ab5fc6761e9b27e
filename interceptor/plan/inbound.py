"""The inbound half of the plan: what others send to this namespace. One short function a concern.

The order: tunnel, probe and admin ports, excluded interface (at the hook), excluded source CIDR, excluded port, included ports.
"""

from __future__ import annotations

from collections.abc import Iterator

from interceptor.config import Config
from interceptor.plan.model import Chain, Goto, Match, Return, Rule, Table
from interceptor.values import PortRange, Proto


def inbound_chain(config: Config, table: Table, protos: tuple[Proto, ...], to_proxy: str, name: str) -> Chain:
    """The decision about what comes in; also about what the proxy sends to its own pod."""
    return Chain(
        table,
        name,
        (
            *_own_ports(config, protos),
            *_excluded_sources(config),
            *_excluded_ports(config, protos),
            *_included_ports(config, protos, to_proxy),
        ),
    )


def _own_ports(config: Config, protos: tuple[Proto, ...]) -> Iterator[Rule]:
    if Proto.TCP not in protos:
        return
    for port, why, option in (
        (config.tunnel_port, "the mesh's tunnel is never captured", "--tunnel-port"),
        (config.probe_port, "probes from outside are never captured", "--probe-port"),
        (config.admin_port, "metrics and health are never captured", "--admin-port"),
    ):
        if port is None:
            continue
        yield Rule(Match(proto=Proto.TCP, dports=(PortRange(port, port),)), Return(), why, option)


def _excluded_sources(config: Config) -> Iterator[Rule]:
    if config.exclude_inbound_cidrs:
        match = Match(src=config.exclude_inbound_cidrs)
        yield Rule(match, Return(), "this client is excluded", "--exclude-inbound-cidrs")


def _excluded_ports(config: Config, protos: tuple[Proto, ...]) -> Iterator[Rule]:
    for proto in protos if config.exclude_inbound_ports else ():
        match = Match(proto=proto, dports=config.exclude_inbound_ports)
        yield Rule(match, Return(), "this port is excluded", "--exclude-inbound-ports")


def _included_ports(config: Config, protos: tuple[Proto, ...], to_proxy: str) -> Iterator[Rule]:
    for proto in protos:
        mechanism = "--udp tproxy" if proto is Proto.UDP else f"--inbound {config.inbound}"
        option = "--include-inbound-ports" if config.include_inbound_ports else mechanism
        match = Match(proto=proto, dports=config.include_inbound_ports)
        yield Rule(match, Goto(to_proxy), "captured inbound", option)
