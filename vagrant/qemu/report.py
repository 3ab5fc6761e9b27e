"""docs/kernels.md's tables from what the last runs left in build/kernels/results: `python -m vagrant.qemu.report`.

The prose around the markers is written by hand; between them nothing is. What was not run here stays as it was.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vagrant.qemu.store import ROOT, STORE
from vagrant.qemu.suites import KERNELS
from vagrant.qemu.variants import VARIANTS

DOCUMENT = ROOT / "docs" / "kernels.md"
RESULTS = STORE / "results"
BLOCK = re.compile(r"(<!-- (\w+): by vagrant/qemu/report.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)
BACKENDS = {"nft": "nft", "iptables-nft": "ipt-nft", "iptables-legacy": "legacy", "libiptc": "libiptc"}
TRIED = ("backends", "redirect", "owner match", "tproxy", "conntrack zones", "conntrack timeouts", "original source", "logging")
Finding: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Sequence[str]]
PARTS = "in parts"  # all that --tests was asked for
OTHERS = ("cgroup match", "packet splice", "connect-time capture", "ipv6")


def main() -> int:
    """Rewrite the tables."""
    tables = {"features": _features, "suites": _suites, "variants": _variants}

    def renewed(found: re.Match[str]) -> str:
        before = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[3].splitlines()]
        return found[1] + "\n".join(tables[found[2]](before)) + "\n" + found[4]

    DOCUMENT.write_text(BLOCK.sub(renewed, DOCUMENT.read_text()))
    return 0


def _features(before: Rows) -> Iterator[str]:
    releases = sorted(KERNELS, key=_number)
    found = {release: _doctor(release) for release in releases}
    old = {row[0]: dict(zip(releases, row[1:], strict=False)) for row in before}
    names = {release: f"{release} ({doctor['release']['found'].split()[0]})" for release, doctor in found.items() if doctor}
    yield from _heading("", *(names.get(release, old[""][release]) for release in releases))
    for name in (*TRIED, *OTHERS):
        show = _by_backend if name in TRIED else _plain
        yield _row(
            name, *(show(doctor[name]) if doctor else old.get(name, {}).get(release, "") for release, doctor in found.items())
        )


def _suites(before: Rows) -> Iterator[str]:
    yield from _heading("kernel", "suite", "passed", "failed", "whole machine, s", "of a processor, s")
    rows = {(row[0], row[1]): list(row) for row in before[2:]}
    runs: dict[tuple[str, str], list[Path]] = {}
    for place in sorted(RESULTS.glob("*-*/junit.xml")):
        release, suite = place.parent.name.split("-", 1)
        if suite != "script":
            runs.setdefault((release, suite if suite in ("short", "full") else PARTS), []).append(place.parent)
    for key, places in runs.items():
        tests = [test for place in places for test in _tests(place)]
        bad = {name for name, good in tests if not good}
        passed = {name for name, _ in tests} - bad
        rows[key] = [*key, f"{len(passed)}", f"{len(bad)}", _sum(places, "seconds"), _sum(places, "processor")]
    yield from (_row(*rows[key]) for key in sorted(rows, key=lambda key: (_number(key[0]), key[1])))


def _tests(place: Path) -> Iterator[tuple[str, bool]]:
    """Each test that a run came to, and whether it passed; skipped is not passed."""
    for case in ET.parse(place / "junit.xml").getroot().iter("testcase"):
        yield f"{case.attrib['classname']}.{case.attrib['name']}", case.find("*") is None


def _sum(places: Sequence[Path], name: str) -> str:
    return str(sum(int(_number_in(place / name)) for place in places))


def _variants(before: Rows) -> Iterator[str]:
    releases = sorted(KERNELS, key=_number)
    old = {row[0]: dict(zip(releases, row[2:], strict=False)) for row in before[2:]}
    yield from _heading("variant", "left out", *(f"{release}, s" for release in releases))
    for name, variant in VARIANTS.items():
        left_out = ", ".join((*variant.without_modules, *variant.without_files, *filter(None, [variant.append])))
        verdicts = (
            _verdict(RESULTS / f"{release}-{name}") or old.get(name, {}).get(release, "not run") for release in releases
        )
        yield _row(name, f"`{left_out}`", *verdicts)


def _verdict(place: Path) -> str:
    """The processor's seconds, or that it failed; "" when it was not run."""
    if not place.is_dir():
        return ""
    status = re.findall(r"MACHINE-STATUS=(\d+)", (place / "console").read_text())
    return _used(place) if status == ["0"] else f"FAILED after {_used(place)}"


def _doctor(release: str) -> dict[str, Finding]:
    for suite in ("full", "short", "script"):
        place = RESULTS / f"{release}-{suite}" / "doctor.json"
        if place.exists():
            return {each["name"]: each for each in json.loads(place.read_text())["findings"]}
    return {}


def _by_backend(finding: Finding) -> str:
    refusals = finding["by_backend"]
    return ", ".join(short if not refusals[name] else f"~~{short}~~" for name, short in BACKENDS.items() if name in refusals)


def _plain(finding: Finding) -> str:
    return "yes" if finding["status"] == "ok" else str(finding["status"])


def _used(place: Path) -> str:
    return _number_in(place / "processor")


def _number_in(file: Path) -> str:
    return file.read_text().strip()


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _heading(*cells: object) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*("---" for _ in cells))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
