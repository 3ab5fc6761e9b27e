"""Options that only the proxy reads: limits, times, the upstream, the log. No plan depends on them. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from interceptor.kinds import (
    AUTOMATIC_COUNT,
    CIDRS,
    DURATION,
    GRACE,
    NAMES_SEEN,
    OPTIONAL_COUNT,
    OPTIONAL_DIRECTORY,
    OPTIONAL_DURATION,
    PORTS,
    RESOLVERS,
    SWITCH,
    one_of,
    option,
)
from interceptor.values import Network, PortRange, Server

# Shown in the help of the commands that have a proxy; all commands take them, so that a pod's environment serves them all.
PROXY_GROUPS = ("Connections", "Upstream", "DNS", "Flow log")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """Times are in seconds. None: off, but for workers and max_connections, where it is for the proxy to choose."""

    workers: int | None = option(
        "Connections", AUTOMATIC_COUNT, None, "Processes that share the ports; auto: the processors that this cgroup may use."
    )
    relay: Literal["auto", "packet", "splice", "copy"] = option(
        "Connections",
        one_of("auto", "packet", "splice", "copy"),
        "auto",
        "What moves the bytes; auto: the cheapest that works here.",
    )
    packet_pins: str | None = option(
        "Connections",
        OPTIONAL_DIRECTORY,
        None,
        "Where the packet relay leaves its flows to the next proxy, below /sys/fs/bpf; without, they end with this one.",
    )
    max_connections: int | None = option(
        "Connections", AUTOMATIC_COUNT, None, "Refuse more open connections than this; auto: what the descriptors allow."
    )
    max_connections_per_client: int | None = option(
        "Connections",
        OPTIONAL_COUNT,
        None,
        "Refuse more open connections of one client address. Outbound, the whole pod is one client.",
    )
    connect_timeout: float = option(
        "Connections",
        DURATION,
        10.0,  # ztunnel's; Linux alone would try for two minutes
        "Give up on a destination that has not answered for so long.",
    )
    idle_timeout: float | None = option(
        "Connections", OPTIONAL_DURATION, None, "End connections over which nothing moved for so long."
    )
    keepalive: float | None = option(
        "Connections",
        OPTIONAL_DURATION,
        180.0,  # ztunnel's
        "Ask silent peers after so long, and as often again, whether they live; 9 times in vain end the connection.",
    )
    udp_idle_timeout: float = option(
        "Connections",
        DURATION,
        60.0,  # longer than the 30 s of nf_conntrack_udp_timeout, so the kernel forgets first
        "End UDP flows that were silent for so long.",
    )
    drain_deadline: float = option(
        "Connections",
        GRACE,
        5.0,  # ztunnel's; well within the 30 s that Kubernetes grants
        "After SIGTERM, let connections go on for so long; 0: end them at once.",
    )
    upstream_proxy_protocol: Literal["off", "v1", "v2"] = option(
        "Upstream",
        one_of("off", "v1", "v2"),
        "off",
        "Tell servers of the next two options whom a connection is from, by a PROXY protocol header before its first byte.",
    )
    upstream_proxy_protocol_ports: tuple[PortRange, ...] = option(
        "Upstream", PORTS, (), "Inbound: ports of this pod's applications that want the header."
    )
    upstream_proxy_protocol_cidrs: tuple[Network, ...] = option(
        "Upstream", CIDRS, (), "Outbound: destinations that want the header."
    )
    dns_upstream: tuple[Server, ...] = option(
        "DNS",
        RESOLVERS,
        (),
        "Resolvers to ask, in this order, as ip, ip:port or [ip]:port; without any, those in resolv.conf.",
    )
    dns_parallel: bool = option("DNS", SWITCH, False, "Ask all resolvers at once; the first good answer wins.")
    dns_cache_size: int | None = option("DNS", OPTIONAL_COUNT, 4096, "Keep so many answers; off: ask every time.")
    peek: tuple[str, ...] = option(
        "Flow log",
        NAMES_SEEN,
        (),
        "Look for these names in what a client sends first: TLS server name and ALPN, HTTP host.",
    )
