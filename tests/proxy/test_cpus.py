"""How many workers: what the cgroups leave of the processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from interceptor.proxy import cpus

PERIOD = 100_000


def v2(root: Path, **quotas: int | None) -> tuple[str, str]:
    """A cgroup v2 tree /a/b with these quotas, in microseconds; None: no limit. What `available` takes."""
    for path, quota in quotas.items():
        directory = root / path.replace("_", "/").lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cpu.max").write_text(f"{'max' if quota is None else quota} {PERIOD}\n")
    own = root / "self"
    own.write_text("0::/a/b\n")
    return str(root), str(own)


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger machine than most."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)))


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"a_b": None, "a": None}, 8),
        ({"a_b": 2 * PERIOD, "a": None}, 2),
        ({"a_b": None, "a": 3 * PERIOD}, 3),
        ({"a_b": 150_000}, 1),
        ({"a_b": 50_000}, 1),
        ({"a_b": 99 * PERIOD}, 8),
        ({"_": 4 * PERIOD}, 4),
        ({}, 8),
    ],
    ids=["no limit", "own", "the parent's", "one and a half", "half", "more than there are", "seen as the root", "not mounted"],
)
def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path, quotas: dict[str, int | None], expected: int) -> None:
    assert cpus.available(*v2(tmp_path, **quotas)) == expected


def test_a_quota_of_cgroup_v1_counts(tmp_path: Path) -> None:
    directory = tmp_path / "cpu,cpuacct" / "a"
    directory.mkdir(parents=True)
    (directory / "cpu.cfs_quota_us").write_text(f"{2 * PERIOD}\n")
    (directory / "cpu.cfs_period_us").write_text(f"{PERIOD}\n")
    own = tmp_path / "self"
    own.write_text("4:cpu,cpuacct:/a\n1:name=systemd:/x\n")
    assert cpus.available(str(tmp_path), str(own)) == 2


def test_without_proc_all_processors_count(tmp_path: Path) -> None:
    assert cpus.available(str(tmp_path), str(tmp_path / "missing")) == 8
