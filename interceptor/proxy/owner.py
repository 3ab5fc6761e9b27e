"""Which process is behind a socket: uid and inode from the kernel at once, pid and command from /proc when that is affordable.

Reads /proc; decides nothing. What cannot be known (another pid namespace, no permission, gone already) stays None.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

PROC = "/proc"
# A search may take one part in so many of the proxy's time; on a host with thousands of processes it then skips flows.
SEARCH_SHARE = 20
# A command line's start identifies it; a flow record is one line.
COMMAND_SIZE = 120


@dataclass(frozen=True, slots=True)
class Process:
    """A process as an operator knows it."""

    pid: int
    command: str


class ProcessFinder:
    """Finds the process that holds a socket open, among those of one network namespace."""

    def __init__(self, netns: tuple[int, int]) -> None:
        self._netns = netns  # (device, inode)
        self._recent: list[int] = []  # the same few processes open most connections
        self._not_before = 0.0

    def find(self, inode: int) -> Process | None:
        """The process with socket `inode` open; None when it is not found, or when searching has cost too much lately."""
        if inode == 0:
            return None
        for pid in self._recent:
            if _holds(pid, inode):
                return _process(pid)
        start = time.monotonic()
        if start < self._not_before:
            return None
        found = next((pid for pid in self._neighbours() if _holds(pid, inode)), None)
        end = time.monotonic()
        self._not_before = end + SEARCH_SHARE * (end - start)
        if found is None:
            return None
        self._recent = [found, *(pid for pid in self._recent if pid != found)][:4]
        return _process(found)

    def _neighbours(self) -> Iterator[int]:
        # Youngest first: a new connection is often a new process's.
        pids = sorted((int(name) for name in os.listdir(PROC) if name.isdigit()), reverse=True)
        for pid in pids:
            try:
                found = os.stat(f"{PROC}/{pid}/ns/net")
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == self._netns:
                yield pid


def _holds(pid: int, inode: int) -> bool:
    target = f"socket:[{inode}]"
    directory = f"{PROC}/{pid}/fd"
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(f"{directory}/{descriptor}") == target:
                return True
        except OSError:
            continue  # closed since it was listed
    return False


def _process(pid: int) -> Process | None:
    try:
        with open(f"{PROC}/{pid}/cmdline", "rb") as file:
            line = file.read(COMMAND_SIZE)
    except OSError:
        return None
    return Process(pid, line.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace"))
