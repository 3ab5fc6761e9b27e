"""Where programs and maps are pinned that outlive a process. Light: whether there is anything is asked at every init."""

from __future__ import annotations

import os

BPFFS = "/sys/fs/bpf"  # where systemd mounts it, and everybody looks


def root() -> str:
    """The directory that holds ours of every network namespace."""
    return os.path.join(BPFFS, "interceptor")


def directory(netns_cookie: int) -> str:
    """Where the maps and links of a network namespace are pinned."""
    return os.path.join(root(), str(netns_cookie))
