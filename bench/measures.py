"""The table of measures: which load, and which columns. Knows no contender."""

from __future__ import annotations

from dataclasses import dataclass

from bench.loads import Load, bulk, connections, idle, requests, requests_among_idle


@dataclass(frozen=True, slots=True)
class Metric:
    """One column. `noise`: what is not above this is shown as 0 (resolution of the clocks).

    `ratios`: contenders that it is divided by, each a further column; `added`: what it is more than without a proxy, one more.
    """

    key: str
    title: str
    noise: float = 0.0
    ratios: tuple[str, ...] = ()
    added: bool = False


@dataclass(frozen=True, slots=True)
class Measure:
    """A table of the report."""

    name: str
    title: str
    operation: str
    metrics: tuple[Metric, ...]
    run: Load
    # A long one has up to 10,000 connections to open: fewer rounds, each three times as long.
    long: bool = False
    quick: bool = True


_RATE = Metric("rate", "req/s", ratios=("none", "envoy"))
_P50, _P99 = Metric("p50_us", "p50 µs"), Metric("p99_us", "p99 µs")
_P50_ADDED = Metric("p50_us", "p50 µs", added=True)
_CPU = Metric("proxy_us", "proxy CPU µs", noise=0.05, ratios=("envoy",))
_SYSTEM = Metric("system_us", "system CPU µs")
_SWITCHES = Metric("switches", "proxy switches", noise=0.01)
_BULK = (
    Metric("gbps", "Gb/s", ratios=("none", "envoy")),
    Metric("proxy_s", "proxy CPU s/GB", noise=0.001, ratios=("envoy",)),
    Metric("system_s", "system CPU s/GB"),
    Metric("switches", "proxy switches/GB", noise=1),
)
_UNLOADED = (_P50_ADDED, _P99, _CPU, _SYSTEM)
_HELD = Metric("held", "connections")
_SCALE = (_RATE, _P99, _CPU, _SYSTEM)
_AMONG_IDLE = (*_SCALE, _HELD)

MEASURES = {
    each.name: each
    for each in (
        Measure("bulk1", "Bulk, 1 stream, client to server", "GB", _BULK, bulk(1)),
        Measure("bulk8", "Bulk, 8 streams, client to server", "GB", _BULK, bulk(8), quick=False),
        Measure("bulk1-down", "Bulk, 1 stream, server to client", "GB", _BULK, bulk(1, "-R"), quick=False),
        Measure("rr", "Requests, 64 kept connections", "request", (_RATE, _P50, _P99, _CPU, _SYSTEM, _SWITCHES), requests(64)),
        Measure("latency", "Requests, 1 kept connection (unloaded)", "request", _UNLOADED, requests(1)),
        Measure(
            "conn",
            "New connections, 64 at a time, one request each",
            "connection",
            (Metric("rate", "conn/s", ratios=("none", "envoy", "haproxy")), _CPU, _SYSTEM, _SWITCHES),
            connections,
        ),
        Measure(
            "idle",
            "Idle connections",
            "second",
            (
                _HELD,
                Metric("pss_kb", "proxy PSS KB/connection", noise=0.01, ratios=("envoy",)),
                Metric("slab_kb", "kernel slab KB/connection"),
                Metric("proxy_us", "proxy CPU µs/s, idle"),
            ),
            idle(),
            long=True,
            quick=False,
        ),
        Measure("idle200", "Idle connections, 200", "second", (Metric("pss_kb", "proxy PSS KB/connection"),), idle(200)),
        Measure("c100", "Requests, 100 connections", "request", _SCALE, requests(100), long=True, quick=False),
        Measure("c1000", "Requests, 1,000 connections", "request", _SCALE, requests(1000), long=True, quick=False),
        Measure("c10000", "Requests, 64 busy of 10,000", "request", _AMONG_IDLE, requests_among_idle, long=True, quick=False),
    )
}  # fmt: skip
GROUPS = {
    "bulk": ("bulk1", "bulk8", "bulk1-down"),
    "scale": ("c100", "c1000", "c10000"),
}
DEFAULT = ("bulk1", "bulk8", "rr", "latency", "conn", "idle", "scale")
