"""One run: one contender, one measure, one path; and the order of many. Prints progress; writes nothing."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench import accounting, audit, generators
from bench.contenders import Contender, running, unserved, which
from bench.measures import Measure
from bench.stage import HTTP_PORTS, Discarded, Pins, Stage
from bench.world import Failed, Path, World, start, tcp_counters

QUIET_LOOK_S = 0.3
# Connections that were still being made when a load generator stopped, beside those that it held.
STRAY_CONNECTIONS = 8
COUNT_SOCKET = "served.sock"
ASK_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run: times in seconds, `foreign_limit` in cores."""

    seconds: float
    rounds: int
    long_rounds: int
    foreign_limit: float
    patience_s: float
    retries: int
    deadline: float
    pins: Pins
    workdir: str


@dataclass(frozen=True, slots=True)
class Run:
    """A run that counts. `section`: the heading that it stands under; a path alone, or with what else is particular."""

    section: str
    path: str
    measure: str
    contender: str
    round: int
    values: dict[str, float]
    foreign_cores: float
    connections: int


@dataclass(slots=True)
class Book:
    """All runs, those thrown away with their reasons, and what was not measured."""

    foreign_limit: float
    runs: list[Run] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report: these contenders take turns on one path."""

    title: str
    path: Path
    measures: Sequence[Measure]
    contenders: Sequence[Contender]


def measure_all(world: World, sections: Sequence[Section], settings: Settings, book: Book) -> None:
    """Every measure of every section; within a round every contender once, each round beginning with another one."""
    for section in sections:
        with serving(world, section.path, settings.workdir, settings.pins):
            for measure in section.measures:
                for number in range(settings.long_rounds if measure.long else settings.rounds):
                    if time.monotonic() > settings.deadline:
                        book.left_out["all after the time budget was spent"] = f"beginning with {section.title} {measure.name}"
                        return
                    _round(world, section, measure, number, settings, book)


def _round(world: World, section: Section, measure: Measure, number: int, settings: Settings, book: Book) -> None:
    contenders = section.contenders
    first = number % len(contenders)
    for contender in (*contenders[first:], *contenders[:first]):
        if reason := unserved(contender, section.path):
            book.left_out[f"{contender.name} on {section.path}"] = reason
        else:
            _until_it_counts(world, section, measure, contender, number, settings, book)


@contextmanager
def serving(world: World, path: Path, workdir: str, pins: Pins) -> Iterator[None]:
    """nginx where the path's server is: answers every request with two bytes, keeps connections for ever.

    It says how many it has accepted on a socket in `workdir`: see `served`.
    """
    config = os.path.join(workdir, f"nginx-{path}.conf")
    with open(config, "w", encoding="ascii") as file:
        file.write(_nginx_config(workdir, _threads()))
    nginx = which("nginx") or "nginx"
    # Workers are forked, not replaced: stopping the master stops them.
    server = start([nginx, "-c", config, "-e", "/dev/null"], where=world.server(path), cpus=pins.server)
    try:
        server.wait_listening(*HTTP_PORTS)
        yield
    finally:
        server.stop()


def _nginx_config(workdir: str, workers: int) -> str:
    temporary = "".join(
        f"  {name}_temp_path {workdir}/nginx-{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    listen = "".join(f"    listen {port} backlog=65535;\n    listen [::]:{port} backlog=65535;\n" for port in HTTP_PORTS)
    count = f"  server {{\n    listen unix:{workdir}/{COUNT_SOCKET};\n    location / {{\n      stub_status;\n    }}\n  }}\n"
    return (
        f"user root;\ndaemon off;\nworker_processes {workers};\npid {workdir}/nginx.pid;\n"
        "events {\n  worker_connections 15000;\n  multi_accept on;\n}\n"
        f"http {{\n{temporary}  access_log off;\n  keepalive_timeout 3600s;\n  keepalive_requests 1000000000;\n"
        f"  server {{\n{listen}"
        "    location / {\n      default_type text/plain;\n      return 200 'ok';\n    }\n  }\n"
        f"{count}}}\n"
    )


def served(workdir: str) -> int:
    """How many connections nginx has accepted so far, this question's included."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(ASK_DEADLINE_S)
        sock.connect(os.path.join(workdir, COUNT_SOCKET))
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return generators.nginx_accepted(b"".join(iter(lambda: sock.recv(4096), b"")).decode())


def _threads() -> int:
    # As many as leave the proxy a core, on small machines one.
    return max(1, min(4, (os.cpu_count() or 1) // 2))


def _until_it_counts(
    world: World, section: Section, measure: Measure, contender: Contender, number: int, settings: Settings, book: Book
) -> None:
    """A run, again while others used the CPU or connections went astray; of noisy ones, the quietest counts."""
    best: Run | None = None
    label = f"{section.title} {measure.name} {contender.name} round {number + 1}"
    for _ in range(settings.retries + 1):
        _await_quiet(settings)
        try:
            run = _one(world, section, measure, contender, number, settings)
        except (Discarded, Failed) as why:
            book.discarded.append(f"{label}: {why}")
            print(f"  {label}: discarded: {why}", file=sys.stderr)
            continue
        if best is None or run.foreign_cores < best.foreign_cores:
            best = run
        if run.foreign_cores <= settings.foreign_limit:
            break
    if best is None:
        return
    book.runs.append(best)
    figures = " ".join(f"{key}={value:.4g}" for key, value in best.values.items())
    print(f"  {label}: {figures} (others: {best.foreign_cores:.2f} cores)", file=sys.stderr, flush=True)


def _one(world: World, section: Section, measure: Measure, contender: Contender, number: int, settings: Settings) -> Run:
    path = section.path
    world.forget_connections()
    with running(world, contender, settings.workdir, settings.pins.proxy) as proxy:
        before = {role: tcp_counters(world.named(role)) for role in ("pod", "far")}
        before_served = served(settings.workdir)
        seconds = settings.seconds * (3 if measure.long else 1)
        stage = Stage(world, path, seconds, proxy.client_uid, settings.pins, proxy.pids, _threads(), proxy.client_cgroup)
        result = measure.run(stage)
        # The other way round: what reaches the server meanwhile was captured before.
        reached = served(settings.workdir) - before_served - 1
        after = {role: tcp_counters(world.named(role)) for role in ("far", "pod")}
        if proxy.pids != stage.proxy_pids:
            raise Discarded("the proxy began or ended processes meanwhile: its CPU time is not known")
    counted = audit.Counted.between(before, after, proxy.accepted, reached)
    slack = stage.concurrency + STRAY_CONNECTIONS
    if wrong := audit.complaint(counted, path.direction, proxied=contender.kind != "none", slack=slack):
        raise Discarded(wrong)
    connections = counted.far_passive if path.direction == "outbound" else counted.far_active
    if connections < stage.concurrency:
        raise Discarded(f"only {connections} of {stage.concurrency} connections were opened in time")
    assert stage.used is not None
    values = {**result.values, **_per_operation(stage.used, result.operations)}
    return Run(section.title, str(path), measure.name, contender.name, number, values, stage.used.foreign_cores, connections)


def _per_operation(used: accounting.Used, operations: float) -> dict[str, float]:
    system_s = max(0.0, used.machine_s - max(0.0, used.foreign_s))
    return {
        "proxy_s": used.proxy_s / operations,
        "proxy_us": used.proxy_s / operations * 1e6,
        "system_s": system_s / operations,
        "system_us": system_s / operations * 1e6,
        "switches": used.switches / operations,
    }


def _await_quiet(settings: Settings) -> None:
    """Until others leave the machine alone, for as long as patience lasts."""
    until = time.monotonic() + settings.patience_s
    while time.monotonic() < until:
        before = accounting.used([])
        time.sleep(QUIET_LOOK_S)
        if (accounting.used([]) - before).foreign_cores <= settings.foreign_limit:
            return
