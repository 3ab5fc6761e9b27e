"""Find a cgroup v2 directory by its path in the hierarchy. Reads only."""

from __future__ import annotations

import os

from interceptor.errors import ConfigError, Problem, Unsupported

MOUNTS = "/proc/self/mountinfo"


def mount_point() -> str:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or in hybrid systems /sys/fs/cgroup/unified. Raises Unsupported."""
    with open(MOUNTS, encoding="utf-8", errors="replace") as file:
        for line in file:
            # proc(5): ... root, mount point, options, optional fields, "-", type, source, super options
            fields, _, rest = line.partition(" - ")
            if rest.startswith("cgroup2 "):
                return fields.split()[4].encode().decode("unicode_escape")
    raise Unsupported("--outbound connect: no cgroup v2 is mounted here; mount -t cgroup2 none /sys/fs/cgroup")


def directory(path: str, option: str) -> str:
    """The directory of the cgroup `path`, which `option` names.

    Raises ConfigError when there is none, Unsupported without cgroup v2.
    """
    mounted = mount_point()
    found = os.path.join(mounted, path.strip("/"))
    if not os.path.isdir(found):
        raise ConfigError([Problem(option, path, f"there is no such cgroup v2 ({found}); make it before the rules")])
    return found


def identity(directory: str) -> int:
    """The id that the kernel knows a cgroup by: its directory's inode."""
    return os.stat(directory).st_ino
