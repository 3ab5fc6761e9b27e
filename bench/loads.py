"""The loads: each drives one kind of traffic through the stage's path and says what came of it.

A load does its work within `Stage.measured()`; what processes used meanwhile is added by whoever runs it.
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
from typing import TypeAlias

from bench import accounting, generators
from bench.stage import HTTP_PORTS, Discarded, Stage
from bench.world import Program, start

IPERF_PORT = 5201
BUSY = 64
WARM_UP_CONNECTIONS = 16
GB = 1e9


@dataclass(frozen=True, slots=True)
class Result:
    """What a measure found. `operations` (requests, connections, GB) divides CPU time; `values` are its own columns."""

    operations: float
    values: dict[str, float]


Load: TypeAlias = Callable[[Stage], Result]


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


def requests(connections: int) -> Load:
    """Requests one after the other on kept connections."""

    def load(stage: Stage) -> Result:
        found = _wrk(stage, connections)
        rate = found.count / found.duration_s
        return Result(found.count, {"rate": rate, "p50_us": found.p50_s * 1e6, "p99_us": found.p99_s * 1e6})

    return load


def connections(stage: Stage) -> Result:
    """A new connection for each request."""
    found = _wrk(stage, BUSY, "-H", "Connection: close")
    return Result(found.count, {"rate": found.count / found.duration_s})


def connections_in_turn(stage: Stage) -> Result:
    """The same, one at a time."""
    return Result(_wrk(stage, 1, "-H", "Connection: close").count, {})


def bulk(streams: int, *extra: str) -> Load:
    """As many bytes as go through, in so many streams."""

    def load(stage: Stage) -> Result:
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

    return load


def held_connections() -> int:
    """10,000, or as many as a terminating proxy can have here: it needs two descriptors each."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(10_000, (soft - 400) // 2)


def idle(count: int | None = None) -> Load:
    """Memory of connections that do nothing, and what the proxy does meanwhile."""

    def load(stage: Stage) -> Result:
        wanted = count or held_connections()
        stage.concurrency = wanted
        with _holding(stage, wanted) as holder:
            pss, slab = accounting.pss_kb(stage.proxy_pids), accounting.slab_kb()
            _hold_all(holder)
            pss, slab = accounting.pss_kb(stage.proxy_pids) - pss, accounting.slab_kb() - slab
            with stage.measured():
                time.sleep(stage.seconds)
        more = wanted - WARM_UP_CONNECTIONS
        return Result(stage.seconds, {"pss_kb": pss / more, "slab_kb": slab / more, "held": wanted})

    return load


def requests_among_idle(stage: Stage) -> Result:
    """64 busy connections, all others idle: what it costs to have many."""
    wanted = held_connections()
    with _holding(stage, wanted - BUSY) as holder:
        _hold_all(holder)
        found = requests(BUSY)(stage)
    stage.concurrency = wanted
    return Result(found.operations, {**found.values, "held": wanted})


@contextmanager
def _holding(stage: Stage, count: int) -> Iterator[Program]:
    """hold.py with its first connections made; `_hold_all` makes the others."""
    ports = ",".join(map(str, HTTP_PORTS))
    program = os.path.join(os.path.dirname(__file__), "hold.py")
    words = [sys.executable, program, stage.path.server, ports, str(WARM_UP_CONNECTIONS), str(count)]
    holder = stage.start_client(*words, stdin=subprocess.PIPE)
    try:
        _await(holder, "warm")
        yield holder
    finally:
        holder.stop()


def _hold_all(holder: Program) -> None:
    assert holder.process.stdin is not None
    holder.process.stdin.write("\n")
    holder.process.stdin.flush()
    _await(holder, "held")


def _await(holder: Program, word: str) -> None:
    assert holder.process.stdout is not None
    # The holder has a deadline of its own, so a line or the end comes.
    if holder.process.stdout.readline().strip() != word:
        raise Discarded(f"the connections could not be opened: {holder.said().strip()[-300:]}")
