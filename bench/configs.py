"""Configuration texts of the other proxies: plain TCP to the original destination, both directions, both families. No I/O.

Each is set up as its documentation recommends for this job, and tuned where that helped it.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias

OUTBOUND_PORT, INBOUND_PORT = 15001, 15006
# The source that capture rules know the proxy's inbound leg by.
INBOUND_SOURCE = {"v4": "127.0.0.6", "v6": "::6"}
WILDCARD = {"v4": "0.0.0.0", "v6": "::"}
LONG_S = 3600
Splicing: TypeAlias = Literal["auto", "always"]
SPLICE_OPTIONS: dict[Splicing, tuple[str, ...]] = {
    "auto": ("  option splice-auto",),
    "always": ("  option splice-request", "  option splice-response"),
}


def envoy(stats_socket: str) -> str:
    """Envoy: one tcp_proxy listener a direction and family, original_dst listener filter, ORIGINAL_DST cluster."""
    ways = [(direction, family) for direction in ("outbound", "inbound") for family in ("v4", "v6")]
    return json.dumps(
        {
            "admin": {"address": {"pipe": {"path": stats_socket}}},
            "static_resources": {
                "listeners": [_envoy_listener(*way) for way in ways],
                "clusters": [_envoy_cluster(*way) for way in ways],
            },
        }
    )


def _envoy_listener(direction: str, family: str) -> dict[str, Any]:
    port = OUTBOUND_PORT if direction == "outbound" else INBOUND_PORT
    proxy = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": f"{direction}_{family}",
        "cluster": f"{direction}-{family}",
    }
    original_dst = {"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}
    return {
        "name": f"{direction}-{family}",
        "stat_prefix": f"{direction}_{family}",
        "address": {"socket_address": {"address": WILDCARD[family], "port_value": port}},
        "tcp_backlog_size": 4096,
        "listener_filters": [{"name": "envoy.filters.listener.original_dst", "typed_config": original_dst}],
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}],
    }


def _envoy_cluster(direction: str, family: str) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": f"{direction}-{family}",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        # The default of 1,024 would refuse most of 10,000 connections.
        "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]},
    }
    if direction == "inbound":
        source = {"address": INBOUND_SOURCE[family], "port_value": 0}
        cluster["upstream_bind_config"] = {"source_address": source}
    return cluster


def haproxy(stats_socket: str, threads: int, descriptors: int, *, splicing: Splicing) -> str:
    """HAProxy: transparent backends and 128 KB buffers (twice the throughput of its defaults).

    `auto` splices streams that it finds fast enough, here few; `always` halves the CPU of bulk and costs some on requests.
    """
    # Two descriptors a connection and some of its own, or it refuses to start.
    connections = (descriptors - 300) // 2
    lines = [
        "global",
        f"  nbthread {threads}",
        f"  maxconn {connections}",
        "  maxpipes 64",
        "  tune.bufsize 131072",
        "  tune.pipesize 131072",
        f"  stats socket {stats_socket} mode 600 level operator",
        "defaults",
        "  mode tcp",
        *SPLICE_OPTIONS[splicing],
        f"  maxconn {connections}",
        "  backlog 4096",
        "  timeout connect 5s",
        f"  timeout client {LONG_S}s",
        f"  timeout server {LONG_S}s",
    ]
    for direction, port in (("outbound", OUTBOUND_PORT), ("inbound", INBOUND_PORT)):
        for family, wildcard in WILDCARD.items():
            name = f"{direction}-{family}"
            bind = f"{wildcard}:{port}" if family == "v4" else f"{wildcard}:{port} v6only"
            lines += [
                f"frontend {name}-in",
                f"  bind {bind}",
                f"  default_backend {name}",
                f"backend {name}",
                "  option transparent",
            ]
            if direction == "inbound":
                lines.append(
                    f"  source [{INBOUND_SOURCE[family]}]:0" if family == "v6" else f"  source {INBOUND_SOURCE[family]}"
                )
    return "\n".join([*lines, ""])
