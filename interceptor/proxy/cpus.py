"""How many processors this process may use: its affinity, and the CPU quotas of its cgroup and those above. Only reads."""

from __future__ import annotations

import os
from collections.abc import Iterator

CGROUP_ROOT = "/sys/fs/cgroup"
SELF_CGROUP = "/proc/self/cgroup"


def available(root: str = CGROUP_ROOT, self_cgroup: str = SELF_CGROUP) -> int:
    """Whole processors, at least 1. A quota of 1.5 counts as 1: a second worker would only be throttled."""
    processors = len(os.sched_getaffinity(0))
    quotas = [quota for quota in _quotas(root, self_cgroup) if quota is not None]
    return max(1, min([processors, *(int(quota) for quota in quotas)]))


def _quotas(root: str, self_cgroup: str) -> Iterator[float | None]:
    try:
        with open(self_cgroup) as file:
            lines = file.read().splitlines()
    except OSError:
        return  # no /proc: then there is no limit to be known
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if not controllers:  # cgroup v2 (cgroups(7))
            yield from (_quota_v2(each) for each in _upwards(root, path))
        elif "cpu" in controllers.split(","):
            yield from (_quota_v1(each) for each in _upwards(f"{root}/{controllers}", path))


def _upwards(root: str, path: str) -> Iterator[str]:
    # A container often sees its own cgroup as the root of the mount: then only the last of these exists.
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield "/".join([root, *parts[:depth]])


def _quota_v2(directory: str) -> float | None:
    words = _words(f"{directory}/cpu.max")
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else None


def _quota_v1(directory: str) -> float | None:
    quota, period = _words(f"{directory}/cpu.cfs_quota_us"), _words(f"{directory}/cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _words(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []  # that cgroup, or the controller, is not here
