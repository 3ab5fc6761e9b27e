"""Does what one end does arrive at the other? The same torture through each proxy, and without one. Root; Linux.

    python -m bench.correctness [--proxies none,copy,envoy] [--paths outbound-v4] [--count 3000] [--seed 1]

Half-closes both ways, resets both ways, slow readers, instant closes, up to 8 MB each way; every byte is compared, and whether
the end was a FIN or a RST (bench/torture.py). Prints a table and the first bad connections; exit 1 when one of ours failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from bench import audit, proxies, world
from bench.contenders import PROXY_UID, Contender, Running, running, unserved
from bench.world import PATHS, Path, Program, World, start, tcp_counters

PORT = 7300
DEADLINE_S = 300
SHOWN = 5
TABLE_HEAD = "| | right | what was wrong |\n| - | - | - |"
TORTURE = [sys.executable, "-m", "bench.torture"]


@dataclass(frozen=True, slots=True)
class Bad:
    """A connection of which one end saw what it should not have."""

    number: int
    shape: str
    end: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """All bad connections of a run, and whether all went through the proxy (None: they did)."""

    bad: list[Bad]
    complaint: str | None

    @property
    def connections(self) -> int:
        """How many are bad; both ends of one may complain."""
        return len({each.number for each in self.bad})


def examine(made: World, path: Path, contender: Contender, count: int, seed: int, workdir: str) -> Verdict:
    """The torture through one proxy."""
    made.forget_connections()
    with running(made, contender, workdir, None) as proxy:
        before = {role: tcp_counters(made.named(role)) for role in ("pod", "far")}
        words = [path.server, str(PORT), str(count), str(seed)]
        with (
            _program([*TORTURE, "server", *words], where=made.server(path)) as server,
            _started(server),
            _program(
                [*TORTURE, "client", *words], where=made.client(path), uid=proxy.client_uid, cgroup=proxy.client_cgroup
            ) as client,
        ):
            found = [*_read(client, "client"), *_read(server, "server")]
        after = {role: tcp_counters(made.named(role)) for role in ("pod", "far")}
    counted = audit.Counted.between(before, after, proxy.accepted)
    return Verdict(found, audit.complaint(counted, path.direction, proxied=contender.kind != "none", slack=0))


def _client(made: World, path: Path, proxy: Running, words: list[str]) -> AbstractContextManager[Program]:
    argv = [*TORTURE, "client", *words]
    return _program(argv, where=made.client(path), uid=proxy.client_uid, cgroup=proxy.client_cgroup)


@contextmanager
def _program(argv: list[str], *, where: str, uid: int = 0, cgroup: str | None = None) -> Iterator[Program]:
    program = start(argv, where=where, uid=uid, cgroup=cgroup, stdout=subprocess.PIPE)
    try:
        yield program
    finally:
        program.stop()


@contextmanager
def _started(server: Program) -> Iterator[None]:
    server.wait_listening(PORT)
    yield


def _read(program: Program, end: str) -> list[Bad]:
    try:
        out, _ = program.process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"bench.correctness: the {end} did not end in {DEADLINE_S} s") from None
    if program.process.returncode != 0:
        raise SystemExit(f"bench.correctness: the {end}: exit {program.process.returncode}: {program.said()[-1000:]}")
    return [Bad(each["number"], each["shape"], end, each["wrong"]) for each in map(json.loads, out.splitlines())]


def row(title: str, verdict: Verdict, count: int) -> str:
    """A row of the table."""
    faults = Counter((each.end, each.wrong) for each in verdict.bad)
    what = "; ".join(f"{wrong} at the {end}: {number}" for (end, wrong), number in faults.most_common())
    if verdict.complaint:
        what = "; ".join(filter(None, [what, verdict.complaint]))
    return f"| {title} | {count - verdict.connections} / {count} | {what or '–'} |"


def main(argv: list[str]) -> int:
    """See the top."""
    options = proxies.parser("bench.correctness", __doc__)
    options.add_argument("--proxies", help="as for bench.proxies")
    options.add_argument("--paths", default="outbound-v4", help=f"of {', '.join(PATHS)} [outbound-v4]")
    options.add_argument("--count", type=int, default=3000, help="connections through each proxy [3000]")
    options.add_argument("--seed", type=int, default=1, help="another seed is another set of connections [1]")
    given = options.parse_args(argv)
    proxies.require(options, ("nsenter", "setpriv", "conntrack", "nft", "ip"))
    proxies.prepare()
    left_out: dict[str, str] = {}
    entrants = proxies.chosen_contenders(given.proxies, left_out)
    ours_failed = False
    with tempfile.TemporaryDirectory(prefix="itc-bench-") as workdir, world.world() as made:
        os.chown(workdir, PROXY_UID, PROXY_UID)
        os.chmod(workdir, 0o755)
        for path in proxies.chosen_paths(given.paths):
            print(
                f"\n{path}, {given.count} connections, seed {given.seed}\n\n| | right | what was wrong |\n| - | - | - |",
                flush=True,
            )
            for contender in entrants:
                if reason := unserved(contender, path):
                    print(f"| {proxies.title(contender)} | – | {reason} |")
                    continue
                verdict = examine(made, path, contender, given.count, given.seed, workdir)
                ours_failed |= contender.kind == "ours" and bool(verdict.bad or verdict.complaint)
                print(row(proxies.title(contender), verdict, given.count), flush=True)
                for bad in verdict.bad[:SHOWN]:
                    print(
                        f"    {contender.name}: connection {bad.number}, {bad.shape}: {bad.wrong} at the {bad.end}",
                        file=sys.stderr,
                    )
    for name, why in left_out.items():
        print(f"not examined: {name}: {why}")
    return int(ours_failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
