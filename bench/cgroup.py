"""A cgroup for clients that are captured at connect(), and mounts of our own. Knows no contender."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.world import run

CLONE_NEWNS = 0x20000  # linux/sched.h
BPFFS = "/sys/fs/bpf"


@dataclass(frozen=True, slots=True)
class Cgroup:
    """`path` is relative to the mount, as --capture-cgroup takes it; a pid written to `procs` moves that process here."""

    path: str
    procs: str


@contextmanager
def cgroup() -> Iterator[Cgroup]:
    """A cgroup v2 of ours; its processes must have ended when the block does."""
    path = f"itc-bench-{os.getpid()}"
    directory = os.path.join(mount_point(), path)
    os.mkdir(directory)
    try:
        yield Cgroup(path, os.path.join(directory, "cgroup.procs"))
    finally:
        os.rmdir(directory)


def mount_point() -> str:
    """Where cgroup v2 is mounted."""
    with open("/proc/self/mounts", encoding="utf-8") as file:
        for line in file:
            fields = line.split()
            if fields[2] == "cgroup2":
                return fields[1]
    raise SystemExit("bench: cgroup v2 is not mounted")


def own_bpffs() -> None:
    """From now on this process and its children see a bpffs of their own: what programs pin there ends with us.

    The mount namespace is ours alone; nothing is mounted where others could see it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise SystemExit(f"bench: a mount namespace: {os.strerror(ctypes.get_errno())}")
    run("mount", "--make-rslave", "/")
    run("mount", "-t", "bpf", "bpf", BPFFS)
