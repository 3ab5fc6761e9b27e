"""`python -m vagrant.qemu`: the matrix of kernels and tests, one machine after the other; a line each, and the logs kept."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vagrant.qemu.machine import Hardware, Outcome, boot
from vagrant.qemu.store import STORE
from vagrant.qemu.suites import FULL, KERNELS, SHORT, USERLANDS
from vagrant.qemu.variants import VARIANTS

PYTEST = "python3 -m pytest -q --color=no -o console_output_style=classic"
DOCTOR = "python3 -m interceptor doctor --json >/out/doctor.json"
# Emulated, these take one to two minutes (libiptc ten), three, and hours; what takes longer hangs.
VARIANT_TIMEOUT_S, SHORT_TIMEOUT_S, FULL_TIMEOUT_S = 900, 600, 7200


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
    results = STORE / "results"
    results.mkdir(parents=True, exist_ok=True)
    failed = 0
    for job in _jobs(arguments):
        print(f"{job.name}: ", end="", flush=True)
        outcome = boot(job.hardware, job.script, timeout_s=job.timeout_s)
        _keep(results / job.name, outcome)
        failed += outcome.status != 0
        print(f"{'ok' if outcome.status == 0 else f'FAILED ({outcome.status})'} in {outcome.seconds:.0f} s", flush=True)
        if outcome.status != 0 or arguments.script:
            print(outcome.log, flush=True)
    print(f"logs: {results}")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vagrant.qemu", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="this one only; repeatable")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="this one only, without the suites; repeatable")
    parser.add_argument("--variants", action="store_true", help="every variant, without the suites")
    parser.add_argument("--short", action="store_true", help="what CI runs: ten minutes for all kernels")
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
            tests = SHORT if arguments.short else FULL
            timeout_s = SHORT_TIMEOUT_S if arguments.short else FULL_TIMEOUT_S
            yield Job(f"{release}-{'short' if arguments.short else 'full'}", hardware, _suite(tests), timeout_s)
            if not arguments.short:
                yield from (_variant(release, name) for name in VARIANTS)


def _suite(tests: tuple[str, ...]) -> str:
    return f"{DOCTOR}\n{PYTEST} --durations=10 --junitxml=/out/junit.xml {shlex.join(tests)}\n"


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
    place.mkdir(exist_ok=True)
    (place / "console").write_text(outcome.log)
    (place / "seconds").write_text(f"{outcome.seconds:.0f}\n")
    for name, content in outcome.files.items():
        (place / name).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
