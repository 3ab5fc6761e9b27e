"""The performance model, counted: system calls, context switches and packets a connection, a request, a MB. Root; Linux.

    python -m bench.counts [--proxies copy,envoy] [--out bench/counts.md]

Counts hardly depend on the machine or on who else uses it, and explain the times. One client, one connection at a time: a batch
of events would share its epoll_wait. System calls are counted by strace(1) in a run of their own, as it makes the proxy slow.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench import accounting, loads, machine, proxies, runs, world
from bench.contenders import PROXY_UID, Contender, running
from bench.figures import digits
from bench.stage import Pins, Stage
from bench.world import PATHS, World

OUT = os.path.join(os.path.dirname(os.path.relpath(__file__)), "counts.md")
SECONDS = 1
NAMED_CALLS = 8
TABLE_HEAD = ("| | system calls | which | context switches | packets in the pod |", "| - | - | - | - | - |")
ATTACH_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """A row group of the table; `per` of the loads' operations make one of its units (GB to MB: 0.001)."""

    title: str
    run: loads.Load
    per: float = 1.0


LOADS = (
    Load("one connection: open, one request, close", loads.connections_in_turn),
    Load("one request on a kept connection", loads.requests(1)),
    Load("one MB, client to server", loads.bulk(1), per=0.001),
)


@dataclass(frozen=True, slots=True)
class Counted:
    """For one unit of a load: calls by name, the proxy's context switches, IP packets seen in the pod."""

    calls: dict[str, float]
    switches: float
    packets: float


def count(made: World, contender: Contender, load: Load, workdir: str) -> Counted:
    """Two runs: one for what the kernel counts by itself, one under strace."""
    free = _run(made, contender, load, workdir, under_strace=None)
    table = os.path.join(workdir, "strace")
    traced = _run(made, contender, load, workdir, under_strace=table) if contender.kind != "none" else free
    calls = {}
    if contender.kind != "none":
        with open(table, encoding="ascii") as file:
            calls = {name: number / traced.units for name, number in strace_table(file.read()).items()}
    return Counted(calls, free.switches / free.units, free.packets / free.units)


@dataclass(frozen=True, slots=True)
class _Totals:
    units: float
    switches: int
    packets: int


def _run(made: World, contender: Contender, load: Load, workdir: str, *, under_strace: str | None) -> _Totals:
    made.forget_connections()
    path = PATHS["outbound-v4"]
    with running(made, contender, workdir, None) as proxy:
        stage = Stage(made, path, SECONDS, proxy.client_uid, Pins(), proxy.pids, client_cgroup=proxy.client_cgroup)
        packets = ip_packets(made)
        if under_strace:
            with _traced(proxy.pids, under_strace):
                result = load.run(stage)
        else:
            result = load.run(stage)
        assert stage.used is not None
        return _Totals(result.operations / load.per, stage.used.switches, ip_packets(made) - packets)


@contextmanager
def _traced(pids: list[int], table: str) -> Iterator[None]:
    words = ["strace", "-f", "-c", "-U", "name,calls", "-o", table, *(word for pid in pids for word in ("-p", str(pid)))]
    tracer = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + ATTACH_DEADLINE_S
    while not all(accounting.is_traced(pid) for pid in pids):
        if tracer.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("strace could not attach to the proxy")
        time.sleep(0.01)
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(ATTACH_DEADLINE_S)


def strace_table(text: str) -> dict[str, int]:
    """Name -> calls, from the output of `strace -c -U name,calls`."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit() and row[0] != "total"}


def ip_packets(made: World) -> int:
    """IPv4 packets that the pod's stack received and sent, those over lo twice."""
    counters = world.snmp(made.pod, "Ip")
    return counters["InReceives"] + counters["OutRequests"]


def table(load: Load, counted: dict[str, Counted], titles: dict[str, str]) -> list[str]:
    """A Markdown table."""
    lines = [f"### {load.title}", "", *TABLE_HEAD]
    for name, each in counted.items():
        most = Counter(each.calls).most_common(NAMED_CALLS)
        which = ", ".join(f"{call} {digits(number, 2)}" for call, number in most if number >= 0.005)
        total = digits(sum(each.calls.values()), 2)
        lines.append(f"| {titles[name]} | {total} | {which or '–'} | {digits(each.switches, 2)} | {digits(each.packets, 2)} |")
    return [*lines, ""]


def main(argv: list[str]) -> None:
    """See the top."""
    options = proxies.parser("bench.counts", __doc__)
    options.add_argument("--proxies", help="as for bench.proxies")
    options.add_argument("--out", default=OUT, help=f"[{OUT}]")
    given = options.parse_args(argv)
    proxies.require(options, ("strace", *proxies.NEEDED))
    proxies.prepare()
    left_out: dict[str, str] = {}
    entrants = proxies.chosen_contenders(given.proxies, left_out)
    titles = {each.name: proxies.title(each) for each in entrants}
    lines = ["# Counts", "", f"Written by `{shlex.join(['python', '-m', 'bench.counts', *argv])}`; do not edit.", ""]
    lines += [*machine.description(entrants), "", *EXPLANATION, ""]
    with tempfile.TemporaryDirectory(prefix="itc-bench-") as workdir, world.world() as made:
        os.chown(workdir, PROXY_UID, PROXY_UID)
        os.chmod(workdir, 0o755)
        with runs.serving(made, PATHS["outbound-v4"], workdir, Pins()):
            for load in LOADS:
                lines += table(load, {each.name: count(made, each, load, workdir) for each in entrants}, titles)
    lines += [f"- not counted: {name}: {why}" for name, why in left_out.items()]
    with open(given.out, "w", encoding="utf-8") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


EXPLANATION = (
    "Outbound, IPv4, one client that does one thing after the other. System calls and context switches are the proxy's;",
    "packets are what the pod's IP stack received or sent, so one over loopback counts twice; one of bulk holds up to 64 KB.",
)


if __name__ == "__main__":
    main(sys.argv[1:])
