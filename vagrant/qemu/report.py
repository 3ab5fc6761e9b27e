"""docs/kernels.md's tables from what the last runs left in build/kernels/results: `python -m vagrant.qemu.report`.

The prose around the markers is written by hand; between them nothing is.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from vagrant.qemu.store import ROOT, STORE
from vagrant.qemu.suites import KERNELS
from vagrant.qemu.variants import VARIANTS

DOCUMENT = ROOT / "docs" / "kernels.md"
RESULTS = STORE / "results"
BLOCK = re.compile(r"(<!-- (\w+): by vagrant/qemu/report.py -->\n).*?(<!-- end -->)", re.DOTALL)
BACKENDS = {"nft": "nft", "iptables-nft": "ipt-nft", "iptables-legacy": "legacy"}
TRIED = ("redirect", "owner match", "tproxy", "conntrack zones", "conntrack timeouts", "original source", "logging")
OTHERS = ("cgroup match", "tcx", "connect hook", "ipv6")


def main() -> int:
    """Rewrite the tables."""
    tables = {"features": _features, "suites": _suites, "variants": _variants}
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(BLOCK.sub(lambda found: found[1] + "\n".join(tables[found[2]]()) + "\n" + found[3], text))
    return 0


def _features() -> Iterator[str]:
    found = {release: doctor for release in sorted(KERNELS, key=_number) if (doctor := _doctor(release))}
    yield from _heading("", *(f"{release} ({doctor['release']['found'].split()[0]})" for release, doctor in found.items()))
    for name in TRIED:
        yield _row(name, *(_by_backend(doctor[name]["by_backend"]) for doctor in found.values()))
    for name in OTHERS:
        yield _row(name, *(_plain(doctor[name]) for doctor in found.values()))


def _suites() -> Iterator[str]:
    yield from _heading("kernel", "suite", "passed", "failed", "whole machine, s", "of these tests, s")
    for place in sorted(RESULTS.glob("*-*/junit.xml")):
        release, suite = place.parent.name.split("-", 1)
        totals = ET.parse(place).getroot().find("testsuite")
        assert totals is not None
        bad = int(totals.attrib["failures"]) + int(totals.attrib["errors"])
        passed = int(totals.attrib["tests"]) - bad - int(totals.attrib["skipped"])
        yield _row(release, suite, passed, bad, _seconds(place.parent), f"{float(totals.attrib['time']):.0f}")


def _variants() -> Iterator[str]:
    releases = sorted(KERNELS, key=_number)
    yield from _heading("variant", "left out", *(f"{release}, s" for release in releases))
    for name, variant in VARIANTS.items():
        left_out = ", ".join((*variant.without_modules, *variant.without_files, *filter(None, [variant.append])))
        yield _row(name, f"`{left_out}`", *(_verdict(RESULTS / f"{release}-{name}") for release in releases))


def _verdict(place: Path) -> str:
    if not place.is_dir():
        return "not run"
    status = re.findall(r"MACHINE-STATUS=(\d+)", (place / "console").read_text())
    return _seconds(place) if status == ["0"] else f"FAILED after {_seconds(place)}"


def _doctor(release: str) -> dict[str, dict[str, object]]:
    for suite in ("full", "short"):
        place = RESULTS / f"{release}-{suite}" / "doctor.json"
        if place.exists():
            return {each["name"]: each for each in json.loads(place.read_text())["findings"]}
    return {}


def _by_backend(refusals: dict[str, str]) -> str:
    return ", ".join(short if not refusals[name] else f"~~{short}~~" for name, short in BACKENDS.items() if name in refusals)


def _plain(finding: dict[str, object]) -> str:
    return "yes" if finding["status"] == "ok" else f"{finding['status']}: {finding['found']}"


def _seconds(place: Path) -> str:
    return (place / "seconds").read_text().strip()


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _heading(*cells: object) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*("---" for _ in cells))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
