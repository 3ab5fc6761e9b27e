"""What is measured: each measure drives one load through one path and says what came of it. Knows no contender.

A measure does its work within `Stage.measured()`; what processes used meanwhile is added by whoever runs it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench import accounting, generators
from bench.world import Path, Program, World, start

# Several HTTP ports: with 20,000 connections to one (client's and proxy's), connect() now and then searches milliseconds for a
# free source port, and the search is measured instead of the proxy.
HTTP_PORTS, IPERF_PORT = range(8080, 8096), 5201
GENERATOR_GRACE_S = 30
HELD_DEADLINE_S = 90
WARM_UP_CONNECTIONS = 16
GB = 1e9


class Discarded(Exception):
    """A run that does not count; the text says why."""


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
class Pins:
    """CPUs of the three parties, as taskset(1) takes them; None: the scheduler's choice."""

    client: str | None = None
    server: str | None = None
    proxy: str | None = None


@dataclass(slots=True)
class Stage:
    """Where a run takes place, and what it yielded so far."""

    world: World
    path: Path
    seconds: float
    client_uid: int
    pins: Pins
    proxy_pids: list[int]
    threads: int = 1
    # Filled in by the measure: what was used meanwhile, and how many connections may be under way when it ends.
    used: accounting.Used | None = None
    concurrency: int = 1

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Account for what happens within the block."""
        before = accounting.used(self.proxy_pids)
        yield
        self.used = accounting.used(self.proxy_pids) - before

    def generate(self, *argv: str) -> str:
        """Run a load generator as the client; its stdout. Raises Discarded when it fails or hangs."""
        client = self.start_client(*argv)
        try:
            out, _ = client.process.communicate(timeout=self.seconds + GENERATOR_GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise Discarded(f"{argv[0]} hung") from error
        finally:
            said = client.stop()
        if client.process.returncode != 0:
            raise Discarded(f"{argv[0]}: exit {client.process.returncode}: {(said or out)[-500:]}")
        return out

    def start_client(self, *argv: str, stdin: int = subprocess.DEVNULL) -> Program:
        """A program where clients are."""
        where = self.world.client(self.path)
        return start(argv, where=where, uid=self.client_uid, cpus=self.pins.client, stdin=stdin, stdout=subprocess.PIPE)

    def url(self) -> str:
        """What wrk is given."""
        host = self.path.server if self.path.family == "v4" else f"[{self.path.server}]"
        return f"http://{host}:{HTTP_PORTS[0]}/"


@dataclass(frozen=True, slots=True)
class Result:
    """What a measure found. `operations` (requests, connections, GB) divides CPU time; `values` are its own columns."""

    operations: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """A table of the report."""

    name: str
    title: str
    operation: str
    metrics: tuple[Metric, ...]
    run: Callable[[Stage], Result]
    # A long one has up to 10,000 connections to open: fewer rounds, each three times as long.
    long: bool = False
    quick: bool = True


def _wrk(stage: Stage, connections: int, *extra: str) -> generators.Requests:
    stage.concurrency = connections
    threads = str(min(stage.threads, connections))
    words = [
        "wrk",
        "--latency",
        "-t",
        threads,
        "-c",
        str(connections),
        "-d",
        f"{stage.seconds:.0f}s",
        "--timeout",
        "10s",
        *extra,
    ]
    with stage.measured():
        out = stage.generate(*words, stage.url())
    try:
        found = generators.wrk(out)
    except ValueError as error:
        raise Discarded(str(error)) from error
    if found.errors or not found.count:
        raise Discarded(f"wrk: {found.errors} errors in {found.count} requests")
    return found


def _requests(connections: int) -> Callable[[Stage], Result]:
    def measure(stage: Stage) -> Result:
        found = _wrk(stage, connections)
        rate = found.count / found.duration_s
        return Result(found.count, {"rate": rate, "p50_us": found.p50_s * 1e6, "p99_us": found.p99_s * 1e6})

    return measure


def _connections(stage: Stage) -> Result:
    found = _wrk(stage, 64, "-H", "Connection: close")
    return Result(found.count, {"rate": found.count / found.duration_s})


def _bulk(streams: int, *extra: str) -> Callable[[Stage], Result]:
    def measure(stage: Stage) -> Result:
        stage.concurrency = streams + 1
        server = start(
            ["iperf3", "-s", "-1", "-p", str(IPERF_PORT)], where=stage.world.server(stage.path), cpus=stage.pins.server
        )
        try:
            server.wait_listening(IPERF_PORT)
            words = ["iperf3", "--json", "-c", stage.path.server, "-p", str(IPERF_PORT), "-t", f"{stage.seconds:.0f}"]
            with stage.measured():
                out = stage.generate(*words, "-P", str(streams), "-l", "128K", *extra)
        finally:
            server.stop()
        try:
            found = generators.iperf3(out)
        except ValueError as error:
            raise Discarded(str(error)) from error
        return Result(found.received_bytes / GB, {"gbps": found.received_bytes * 8 / 1e9 / found.duration_s})

    return measure


def held_connections() -> int:
    """10,000, or as many as a terminating proxy can have here: it needs two descriptors each."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(10_000, (soft - 400) // 2)


def _idle(count: int | None = None) -> Callable[[Stage], Result]:
    """Memory of connections that do nothing, and what the proxy does meanwhile."""

    def measure(stage: Stage) -> Result:
        wanted = count or held_connections()
        stage.concurrency = wanted
        holder = stage.start_client(
            sys.executable,
            os.path.join(os.path.dirname(__file__), "hold.py"),
            stage.path.server,
            ",".join(map(str, HTTP_PORTS)),
            str(WARM_UP_CONNECTIONS),
            str(wanted),
            stdin=subprocess.PIPE,
        )
        try:
            _await(holder, "warm")
            pss, slab = accounting.pss_kb(stage.proxy_pids), accounting.slab_kb()
            _tell(holder)
            _await(holder, "held")
            pss, slab = accounting.pss_kb(stage.proxy_pids) - pss, accounting.slab_kb() - slab
            with stage.measured():
                time.sleep(stage.seconds)
        finally:
            said = holder.stop()
        if "Traceback" in said:
            raise Discarded(said.strip().splitlines()[-1])
        return Result(stage.seconds, {"pss_kb": pss / wanted, "slab_kb": slab / wanted, "held": wanted})

    return measure


def _await(holder: Program, word: str) -> None:
    assert holder.process.stdout is not None
    # The holder has a deadline of its own, so a line or the end comes.
    if holder.process.stdout.readline().strip() != word:
        raise Discarded(f"the connections could not be opened: {holder.said().strip()[-300:]}")


def _tell(holder: Program) -> None:
    assert holder.process.stdin is not None
    holder.process.stdin.write("\n")
    holder.process.stdin.flush()


def _most_requests(stage: Stage) -> Result:
    connections = held_connections()
    found = _requests(connections)(stage)
    return Result(found.operations, {**found.values, "held": connections})


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

MEASURES = {
    each.name: each
    for each in (
        Measure("bulk1", "Bulk, 1 stream, client to server", "GB", _BULK, _bulk(1)),
        Measure("bulk8", "Bulk, 8 streams, client to server", "GB", _BULK, _bulk(8), quick=False),
        Measure("bulk1-down", "Bulk, 1 stream, server to client", "GB", _BULK, _bulk(1, "-R"), quick=False),
        Measure("rr", "Requests, 64 kept connections", "request", (_RATE, _P50, _P99, _CPU, _SYSTEM, _SWITCHES), _requests(64)),
        Measure("latency", "Requests, 1 kept connection (unloaded)", "request", _UNLOADED, _requests(1)),
        Measure(
            "conn",
            "New connections, 64 at a time, one request each",
            "connection",
            (Metric("rate", "conn/s", ratios=("none", "envoy")), _CPU, _SYSTEM, _SWITCHES),
            _connections,
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
            _idle(),
            long=True,
            quick=False,
        ),
        Measure("idle200", "Idle connections, 200", "second", (Metric("pss_kb", "proxy PSS KB/connection"),), _idle(200)),
        Measure("c100", "Requests, 100 connections", "request", _SCALE, _requests(100), long=True, quick=False),
        Measure("c1000", "Requests, 1,000 connections", "request", _SCALE, _requests(1000), long=True, quick=False),
        Measure("c10000", "Requests, 10,000 connections", "request", (*_SCALE, _HELD), _most_requests, long=True, quick=False),
    )
}  # fmt: skip
GROUPS = {
    "bulk": ("bulk1", "bulk8", "bulk1-down"),
    "scale": ("c100", "c1000", "c10000"),
}
DEFAULT = ("bulk1", "bulk8", "rr", "latency", "conn", "idle", "scale")
