"""xtables' lock: the host has one, the tables are each network namespace's own.

kube-proxy holds it for seconds, and works on the host's tables: a pod's need not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from interceptor.netns import CURRENT

PATH = "/run/xtables.lock"  # XT_LOCK_NAME (iptables/xshared.h)
LOCKS = "/proc/locks"  # proc_pid_locks(5)
# Where a program is told to take another lock instead: a file that each process has to itself, and can always open.
ENVIRONMENT = {"XTABLES_LOCKFILE": "/proc/self/status"}


def is_held_elsewhere() -> bool:
    """Whether somebody holds it, and all who do work in other network namespaces than the calling thread.

    False when it is free, and when a holder can't be seen: then one waits, as iptables itself does.
    """
    own = _namespace(CURRENT)
    namespaces = [_namespace(f"/proc/{pid}/ns/net") for pid in _holders()]
    return bool(namespaces) and own is not None and all(each is not None and each != own for each in namespaces)


def cannot_be() -> bool:
    """Whether there is no such file and none can be made: in a container with a read-only root nobody has the lock."""
    return not os.path.exists(PATH) and not os.access(os.path.dirname(PATH), os.W_OK)


def _holders() -> Iterator[str]:
    try:
        file = os.stat(PATH)
        with open(LOCKS, encoding="ascii") as lines:
            locks = [line.split() for line in lines]
    except OSError:
        return
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    for _number, kind, *rest in locks:
        if kind != "->" and rest[3] == place:  # the arrow: one who waits
            yield rest[2]


def _namespace(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
