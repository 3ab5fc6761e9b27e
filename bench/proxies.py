"""Our proxy beside no proxy, Envoy, HAProxy and mitmproxy, in network namespaces of their own. Root; Linux.

bench/setup.sh                                       once: load generators, the other proxies
python -m bench.proxies                              the whole programme; about an hour; writes bench/results.md
python -m bench.proxies --quick                      does it work? under a minute
python -m bench.proxies --measure rr,conn --proxies none,splice,envoy --paths inbound-v4
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TypeVar

from bench import cgroup, contenders, machine, report, runs, world
from bench.contenders import CONTENDERS, Contender
from bench.measures import DEFAULT, GROUPS, MEASURES, Measure
from bench.stage import Pins
from bench.world import PATHS, Path

Known = TypeVar("Known")
RESULTS = os.path.join(os.path.dirname(os.path.relpath(__file__)), "results.md")
FIRST_PATH = "outbound-v4"
ELSEWHERE = ("none", "splice", "packet", "envoy", "haproxy")
# (heading, path, measures, contenders): what is measured when nothing is chosen.
PROGRAMME = (
    ("outbound-v4", "outbound-v4", ",".join(DEFAULT), tuple(name for name, each in CONTENDERS.items() if each.default)),
    ("inbound-v4", "inbound-v4", "bulk1,rr,conn", ELSEWHERE),
    ("outbound-v6", "outbound-v6", "bulk1,rr,conn", ELSEWHERE),
    ("inbound-v6", "inbound-v6", "bulk1,rr,conn", ELSEWHERE),
    ("outbound-v4, 2 workers", "outbound-v4", "bulk8,rr,conn", ("none", "splice-2", "packet-2", "envoy-2", "haproxy-2")),
)
NEEDED = ("wrk", "iperf3", "nsenter", "setpriv", "conntrack", "nft", "ip")


def main(argv: list[str]) -> None:
    """See the top."""
    given = arguments(argv)
    left_out: dict[str, str] = {}
    sections = chosen_sections(given, left_out)
    prepare()
    with tempfile.TemporaryDirectory(prefix="itc-bench-") as workdir, world.world() as made:
        # The proxies make their sockets here, as their own user.
        os.chown(workdir, contenders.PROXY_UID, contenders.PROXY_UID)
        os.chmod(workdir, 0o755)
        settings = runs.Settings(
            seconds=1 if given.quick else given.seconds,
            rounds=1 if given.quick else given.rounds,
            long_rounds=1 if given.quick else min(given.rounds, given.long_rounds),
            foreign_limit=given.foreign_limit,
            patience_s=0 if given.quick else given.patience,
            retries=0 if given.quick else given.retries,
            deadline=time.monotonic() + given.budget * 60,
            pins=pins(given.pin),
            workdir=workdir,
        )
        book = runs.Book(given.foreign_limit, left_out=left_out)
        try:
            runs.measure_all(made, sections, settings, book)
        except BaseException as error:
            book.left_out["the rest"] = f"ended by {type(error).__name__}"
            raise
        finally:
            _write(given, argv, [*dict.fromkeys(each for section in sections for each in section.contenders)], book, settings)
    if given.quick and (book.discarded or not book.runs):
        raise SystemExit("bench: runs were discarded")


def _write(
    given: argparse.Namespace, argv: list[str], entrants: list[Contender], book: runs.Book, settings: runs.Settings
) -> None:
    command = shlex.join(["python", "-m", "bench.proxies", *argv])
    about = [
        *machine.description(entrants),
        f"- {settings.seconds:g} s a run" + (f"; pinned: {given.pin}" if given.pin else ""),
    ]
    text = report.markdown(book, command=command, machine=about, titles={each.name: title(each) for each in entrants})
    if given.out != "-":
        with open(given.out, "w", encoding="utf-8") as file:
            file.write(text)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            file.write(report.json_lines(book))
    print(text)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    options = parser("bench.proxies", __doc__)
    options.add_argument("--measure", help=f"of {', '.join((*GROUPS, *MEASURES))} [{','.join(DEFAULT)}]")
    options.add_argument("--proxies", help=f"of {', '.join(CONTENDERS)} [all that run here, with 1 worker]")
    options.add_argument("--paths", help=f"of {', '.join(PATHS)} [{FIRST_PATH}]")
    options.add_argument("--rounds", type=int, default=5, help="[5]")
    options.add_argument("--long-rounds", type=int, default=2, help="rounds of measures with up to 10,000 connections [2]")
    options.add_argument("--seconds", type=int, default=3, help="of each run [3]")
    options.add_argument("--quick", action="store_true", help="1 round of 1 s; fails when a run is discarded")
    options.add_argument("--pin", default="", help="CPUs: client=0,server=0,proxy=1 (several: 2-3) [the scheduler's choice]")
    options.add_argument("--foreign-limit", type=float, default=0.12, help="cores that others may use [0.12]")
    options.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine before each run [20]")
    options.add_argument("--retries", type=int, default=2, help="of a noisy or discarded run [2]")
    options.add_argument("--budget", type=float, default=90, help="minutes, after which no run is begun [90]")
    options.add_argument("--out", default=RESULTS, help=f"the report, printed too; - prints it only [{RESULTS}]")
    options.add_argument("--json", help="also write every run there, one JSON document a line")
    given = options.parse_args(argv)
    require(options, NEEDED)
    return given


def parser(program: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with the module's docstring as it is written."""
    return argparse.ArgumentParser(prog=program, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def require(options: argparse.ArgumentParser, programs: Sequence[str]) -> None:
    """End with exit 2 unless we are root and all programs are there."""
    if os.geteuid() != 0:
        options.error("needs root: network namespaces")
    if absent := [name for name in programs if not contenders.which(name)]:
        options.error(f"not installed: {', '.join(absent)} (bench/setup.sh)")


def chosen_measures(names: str | None, *, quick: bool) -> list[Measure]:
    """The measures named, groups spelled out, each once."""
    if names is None and quick:
        return [each for each in MEASURES.values() if each.quick]
    wanted = names.split(",") if names else DEFAULT
    spelled = [one for name in wanted for one in GROUPS.get(name, (name,))]
    return [_known(MEASURES, name, "--measure") for name in dict.fromkeys(spelled)]


def chosen_contenders(names: str | None, left_out: dict[str, str], *, quick: bool = False) -> list[Contender]:
    """Those named, which must run here; or all that do, the others with their reasons in `left_out`."""
    if names:
        wanted = [_known(CONTENDERS, name, "--proxies") for name in names.split(",")]
        if problems := [f"{each.name}: {reason}" for each in wanted if (reason := contenders.missing(each))]:
            raise refused("--proxies: " + "; ".join(problems))
        return wanted
    chosen = []
    for each in CONTENDERS.values():
        if each.default and (each.quick or not quick):
            if reason := contenders.missing(each):
                left_out[each.name] = reason
            else:
                chosen.append(each)
    return chosen


def chosen_paths(names: str) -> list[Path]:
    """The paths named."""
    return [_known(PATHS, name, "--paths") for name in names.split(",")]


def chosen_sections(given: argparse.Namespace, left_out: dict[str, str]) -> list[runs.Section]:
    """What --measure, --proxies and --paths name; without any of them, PROGRAMME."""
    if given.quick or given.measure or given.proxies or given.paths:
        measured = chosen_measures(given.measure, quick=given.quick)
        entrants = chosen_contenders(given.proxies, left_out, quick=given.quick)
        return [runs.Section(str(path), path, measured, entrants) for path in chosen_paths(given.paths or FIRST_PATH)]
    sections = []
    for title, path, measures, proxies in PROGRAMME:
        entrants = []
        for name in proxies:
            if reason := contenders.missing(CONTENDERS[name]):
                left_out[name] = reason
            else:
                entrants.append(CONTENDERS[name])
        sections.append(runs.Section(title, PATHS[path], chosen_measures(measures, quick=False), entrants))
    return sections


def title(contender: Contender) -> str:
    """How tables call it."""
    return {
        "none": "no proxy",
        "ours": f"**interceptor, {contender.name.removesuffix('-2')}**" + (", 2 workers" if contender.workers == 2 else ""),
    }.get(contender.kind, contender.name.replace("-2", ", 2 workers"))


def pins(text: str) -> Pins:
    """client=0,server=0,proxy=1 as Pins."""
    try:
        return Pins(**dict(part.split("=", 1) for part in text.split(",") if part))
    except (TypeError, ValueError):
        raise refused(f"--pin {text}: client=CPUS,server=CPUS,proxy=CPUS is right") from None


def refused(text: str) -> SystemExit:
    """The end that bad options come to: a line on stderr, exit 2."""
    print(f"bench: {text}", file=sys.stderr)
    return SystemExit(2)


def prepare() -> None:
    """As many descriptors as we may have, and a bpffs of our own: every contender inherits both. SIGTERM cleans up too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cgroup.own_bpffs()


def _known(table: dict[str, Known], name: str, option: str) -> Known:
    if name not in table:
        raise refused(f"{option} {name}: not one of {', '.join(table)}")
    return table[name]


if __name__ == "__main__":
    main(sys.argv[1:])
