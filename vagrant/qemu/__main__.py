"""`python -m vagrant.qemu`: the matrix of kernels and tests, a machine for each processor; a line each, and the logs kept."""

from __future__ import annotations

import argparse
import os
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
from vagrant.qemu.suites import FULL, KERNELS, USERLANDS, kernel_tests, short
from vagrant.qemu.variants import VARIANTS

RESULTS = STORE / "results"
# Looking for plugins, of which these tests need none, takes seconds.
PYTEST = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -q --color=no -o console_output_style=classic"
# Emulated, these take one to two minutes (libiptc ten), three, and hours; what takes longer hangs.
VARIANT_TIMEOUT_S, SHORT_TIMEOUT_S, FULL_TIMEOUT_S = 1800, 1800, 4 * 3600


@dataclass(frozen=True, slots=True)
class Job:
    """One machine to boot, and what to run in it."""

    name: str
    hardware: Hardware
    script: str
    timeout_s: int


def main() -> int:
    """Run what the arguments ask for; 1 when anything failed."""
    arguments = _arguments()
    started = time.monotonic()
    jobs = list(_jobs(arguments))
    with ThreadPoolExecutor(arguments.at_once) as at_once:
        _prepare(at_once, jobs)
        print(f"kernels and file systems: {time.monotonic() - started:.0f} s", flush=True)
        running = {at_once.submit(boot, job.hardware, job.script, timeout_s=job.timeout_s): job for job in jobs}
        failed = sum(_tell(running[done], done.result(), arguments) for done in as_completed(running))
    print(f"logs: {RESULTS}; {time.monotonic() - started:.0f} s in all")
    return 1 if failed else 0


def _prepare(at_once: ThreadPoolExecutor, jobs: list[Job]) -> None:
    """Fetch and build each thing once, the slowest first, so that two machines never wait for the same."""
    wanted = [at_once.submit(userland, suite) for suite in dict.fromkeys(job.hardware.userland for job in jobs)]
    fetched = [at_once.submit(kernel, suite) for suite in dict.fromkeys(job.hardware.kernel for job in jobs)]
    for each in (*wanted, *fetched):
        each.result()


def _tell(job: Job, outcome: Outcome, arguments: argparse.Namespace) -> bool:
    """Keep and print how a machine ended; whether it failed."""
    _keep(RESULTS / job.name, outcome)
    verdict = "ok" if outcome.status == 0 else f"FAILED ({outcome.status})"
    print(f"{job.name}: {verdict} in {outcome.seconds:.0f} s, {outcome.processor_s:.0f} s of a processor", flush=True)
    if outcome.status != 0 or arguments.script:
        print(outcome.log, flush=True)
    return outcome.status != 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vagrant.qemu", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="this one only; repeatable")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="this one only, without the suites; repeatable")
    parser.add_argument("--suites", action="store_true", help="all tests in network namespaces, without the variants")
    parser.add_argument("--variants", action="store_true", help="every variant, without the suites")
    parser.add_argument("--short", action="store_true", help="what CI runs: ten minutes for all kernels")
    processors = len(os.sched_getaffinity(0))
    parser.add_argument("--at-once", type=int, default=processors, metavar="N", help="machines at a time [one a processor]")
    parser.add_argument("--script", help="run this shell script in place of tests")
    return parser.parse_args()


def _jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    for release in arguments.kernel or KERNELS:
        hardware = Hardware(KERNELS[release], USERLANDS.get(release, "bookworm"))
        if arguments.script:
            yield Job(f"{release}-script", hardware, arguments.script, FULL_TIMEOUT_S)
        elif arguments.variants or arguments.variant:
            yield from (_variant(release, name) for name in arguments.variant or VARIANTS)
        else:
            name, tests, timeout_s = (
                ("short", short(release), SHORT_TIMEOUT_S)
                if arguments.short
                else ("full", (*kernel_tests(release), *FULL), FULL_TIMEOUT_S)
            )
            yield Job(f"{release}-{name}", hardware, _suite(release, tests), timeout_s)
            if not (arguments.short or arguments.suites):
                yield from (_variant(release, name) for name in VARIANTS)


def _suite(release: str, tests: tuple[str, ...]) -> str:
    return f"KERNEL={release} {PYTEST} --durations=10 --junitxml=/out/junit.xml {shlex.join(tests)}\n"


def _variant(release: str, name: str) -> Job:
    variant = VARIANTS[name]
    hardware = Hardware(
        KERNELS[release],
        USERLANDS.get(release, "bookworm"),
        without_modules=variant.without_modules,
        without_files=variant.without_files,
        append=variant.append,
    )
    script = f"VARIANT={name} {PYTEST} vagrant/qemu/guest/test_variant.py\n"
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
