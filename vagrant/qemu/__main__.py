"""`python -m vagrant.qemu`: the matrix of kernels and tests, a machine for each processor; a line each, and the logs kept."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from vagrant.qemu.debian import kernel, userland
from vagrant.qemu.machine import Hardware, Outcome, boot
from vagrant.qemu.store import STORE
from vagrant.qemu.suites import KERNELS, USERLANDS, arguments
from vagrant.qemu.variants import VARIANTS

RESULTS = STORE / "results"
# Looking for plugins, of which these tests need none, takes seconds.
NO_PLUGINS = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"
PYTEST = "python3 -m pytest -q --color=no -o console_output_style=classic"
# Emulated, these take one to two minutes (libiptc ten), three, and hours; what takes longer hangs.
VARIANT_TIMEOUT_S, SHORT_TIMEOUT_S, FULL_TIMEOUT_S = 1800, 1800, 4 * 3600
# Then tests are interrupted, which makes pytest sum up what was done; before the machine is killed, which loses that.
ENOUGH = "timeout --signal=INT --kill-after=120"
BEFORE_TIMEOUT_S = 300
PUNCTUATION = re.compile(r"\W+")


@dataclass(frozen=True, slots=True)
class Job:
    """One machine to boot, and what to run in it."""

    name: str
    hardware: Hardware
    script: str
    timeout_s: int


def main() -> int:
    """Run what the arguments ask for; 1 when anything failed."""
    asked = _asked()
    started = time.monotonic()
    jobs = list(_jobs(asked))
    with ThreadPoolExecutor(asked.at_once) as at_once:
        _prepare(at_once, jobs)
        print(f"kernels and file systems: {time.monotonic() - started:.0f} s", flush=True)
        running = {at_once.submit(boot, job.hardware, job.script, timeout_s=job.timeout_s): job for job in jobs}
        failed = sum(_tell(running[done], done.result(), asked) for done in as_completed(running))
    print(f"logs: {RESULTS}; {time.monotonic() - started:.0f} s in all")
    return 1 if failed else 0


def _prepare(at_once: ThreadPoolExecutor, jobs: list[Job]) -> None:
    """Fetch and build each thing once, the slowest first, so that two machines never wait for the same."""
    wanted = [at_once.submit(userland, suite) for suite in dict.fromkeys(job.hardware.userland for job in jobs)]
    fetched = [at_once.submit(kernel, suite) for suite in dict.fromkeys(job.hardware.kernel for job in jobs)]
    for each in (*wanted, *fetched):
        each.result()


def _tell(job: Job, outcome: Outcome, asked: argparse.Namespace) -> bool:
    """Keep and print how a machine ended; whether it failed."""
    _keep(RESULTS / job.name, outcome)
    verdict = "ok" if outcome.status == 0 else f"FAILED ({outcome.status})"
    print(f"{job.name}: {verdict} in {outcome.seconds:.0f} s, {outcome.processor_s:.0f} s of a processor", flush=True)
    if outcome.status != 0 or asked.script:
        print(outcome.log, flush=True)
    return outcome.status != 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vagrant.qemu", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="this one only; repeatable")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="this one only, without the suites; repeatable")
    parser.add_argument("--suites", action="store_true", help="all tests in network namespaces, without the variants")
    parser.add_argument("--variants", action="store_true", help="every variant, without the suites")
    parser.add_argument("--short", action="store_true", help="what CI runs: ten minutes for all kernels")
    parser.add_argument("--tests", action="append", metavar="WORDS", help="these: short, full, arguments of pytest; repeatable")
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--at-once", type=int, default=processors, metavar="N", help="machines at a time [one a processor]")
    parser.add_argument("--script", help="run this shell script in place of tests")
    return parser.parse_args()


def _jobs(asked: argparse.Namespace) -> Iterator[Job]:
    for release in asked.kernel or KERNELS:
        hardware = Hardware(KERNELS[release], USERLANDS.get(release, "bookworm"))
        if asked.script:
            yield Job(f"{release}-script", hardware, asked.script, FULL_TIMEOUT_S)
        elif asked.variants or asked.variant:
            yield from (_variant(release, name) for name in asked.variant or VARIANTS)
        else:
            for words in asked.tests or ["short" if asked.short else "full"]:
                yield _suite(release, hardware, words)
            if not (asked.short or asked.suites or asked.tests):
                yield from (_variant(release, name) for name in VARIANTS)


def _suite(release: str, hardware: Hardware, words: str) -> Job:
    timeout_s = SHORT_TIMEOUT_S if words == "short" else FULL_TIMEOUT_S
    pytest = f"{PYTEST} --durations=10 --junitxml=/out/junit.xml {shlex.join(arguments(release, words))}"
    script = f"export KERNEL={release} {NO_PLUGINS}\n{ENOUGH} {timeout_s - BEFORE_TIMEOUT_S} {pytest}\n"
    return Job(f"{release}-{PUNCTUATION.sub('-', words)}", hardware, script, timeout_s)


def _variant(release: str, name: str) -> Job:
    variant = VARIANTS[name]
    hardware = Hardware(
        KERNELS[release],
        USERLANDS.get(release, "bookworm"),
        without_modules=variant.without_modules,
        without_files=variant.without_files,
        append=variant.append,
    )
    script = f"VARIANT={name} {NO_PLUGINS} {PYTEST} vagrant/qemu/guest/test_variant.py\n"
    return Job(f"{release}-{name}", hardware, script, VARIANT_TIMEOUT_S)


def _keep(place: Path, outcome: Outcome) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "console").write_text(outcome.log)
    (place / "seconds").write_text(f"{outcome.seconds:.0f}\n")
    (place / "processor").write_text(f"{outcome.processor_s:.0f}\n")
    for name, content in outcome.files.items():
        (place / name).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
