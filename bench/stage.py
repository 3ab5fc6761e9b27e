"""Where a run takes place: the path, the client, what is accounted. Knows no contender and no load."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench import accounting
from bench.world import Path, Program, World, start

# Several HTTP ports: with 20,000 connections to one (client's and proxy's), connect() now and then searches milliseconds for a
# free source port, and the search is measured instead of the proxy.
HTTP_PORTS = range(8080, 8096)
GENERATOR_GRACE_S = 30


class Discarded(Exception):
    """A run that does not count; the text says why."""


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
    client_cgroup: str | None = None
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
        return start(
            argv,
            where=self.world.client(self.path),
            uid=self.client_uid,
            cpus=self.pins.client,
            cgroup=self.client_cgroup,
            stdin=stdin,
            stdout=subprocess.PIPE,
        )

    def url(self) -> str:
        """What wrk is given."""
        host = self.path.server if self.path.family == "v4" else f"[{self.path.server}]"
        return f"http://{host}:{HTTP_PORTS[0]}/"
