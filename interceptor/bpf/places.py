"""Where programs and maps are pinned that outlive a process. Light: whether there is anything is asked at every init."""

from __future__ import annotations

import os

BPFFS = "/sys/fs/bpf"  # where systemd mounts it, and everybody looks
CONNECT = "connect-"


def root() -> str:
    """The directory that holds ours of every network namespace."""
    return os.path.join(BPFFS, "interceptor")


def connect_directory(netns_cookie: int) -> str:
    """Where the maps and links of `--outbound connect` are pinned for a network namespace."""
    return os.path.join(root(), f"{CONNECT}{netns_cookie}")
