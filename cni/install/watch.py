"""Keep the installation as it should be, beside programs that rewrite the conflist. Ends without undoing anything.

Another network agent that starts, or is told anew what to do, writes its conflist without our entry. inotify tells at once;
a look every POLL_S makes sure, since inotify says nothing of a directory that was replaced.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from cni.install import node as installing
from cni.install.files import InstallError
from cni.install.node import Node

POLL_S = 30.0
# What a writer does to a file takes it some milliseconds; ours waits until it is quiet.
SETTLE_S = 0.05
# More rewrites than this within a minute are a fight: two programs that each undo what the other does (cilium's cni.exclusive).
FIGHT_REWRITES = 5
FIGHT_WINDOW_S = 60.0
# While there is a fight: no faster than this, so that the node does not spend its time on it, and pods in between are told.
FIGHT_PAUSE_S = 1.0
# linux/inotify.h
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_NONBLOCK = os.O_NONBLOCK
IN_CLOEXEC = os.O_CLOEXEC
EVENTS = IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF
HEADER = struct.Struct("=iIII")

# what happened ("repaired", "fight", "trouble"), and more about it
OnEvent = Callable[[str, str], None]


def keep(node: Node, stop: threading.Event, on_event: OnEvent, poll_s: float = POLL_S) -> None:
    """Install, and put back what is missing, until `stop` is set."""
    repairs: deque[float] = deque()
    fighting = False
    while not stop.is_set():
        # Watched before it is looked at: what is written in between is told.
        with Watch((node.net_dir, node.bin_dir)) as watch:
            _repair(node, repairs, on_event)
            while repairs and repairs[0] < time.monotonic() - FIGHT_WINDOW_S:
                repairs.popleft()
            if (len(repairs) > FIGHT_REWRITES) is not fighting:
                fighting = not fighting
                state = "another program keeps rewriting the conflist" if fighting else "the conflist is left alone again"
                on_event("fight" if fighting else "peace", f"{node.net_dir}: {state}")
            watch.wait(poll_s, stop)
        stop.wait(FIGHT_PAUSE_S if fighting else SETTLE_S)


def _repair(node: Node, repairs: deque[float], on_event: OnEvent) -> None:
    try:
        changed = installing.install(node, socket_wait_s=0)
    except InstallError as error:
        on_event("trouble", str(error))
        return
    for change in changed:
        on_event("repaired", change.path)
    if changed:
        repairs.append(time.monotonic())


class Watch:
    """inotify on directories; those that are not there are looked for at the next poll."""

    def __init__(self, folders: tuple[str, ...]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)
        if self._descriptor < 0:
            raise InstallError(f"inotify: {os.strerror(ctypes.get_errno())}; fs.inotify.max_user_instances may be too low")
        for folder in folders:
            libc.inotify_add_watch(self._descriptor, os.fsencode(folder), EVENTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._descriptor)

    def wait(self, timeout_s: float, stop: threading.Event) -> None:
        """Until others changed something, `timeout_s` have passed, or `stop` is set (seen within 0.2 s)."""
        deadline = time.monotonic() + timeout_s
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if select.select([self._descriptor], [], [], min(left, 0.2))[0] and self._is_others():
                return

    def _is_others(self) -> bool:
        with suppress(BlockingIOError):
            content = os.read(self._descriptor, 1 << 16)
            at, found = 0, False
            while at < len(content):
                _, mask, _, length = HEADER.unpack_from(content, at)
                name = content[at + HEADER.size : at + HEADER.size + length].rstrip(b"\0")
                at += HEADER.size + length
                found = found or bool(mask & (IN_DELETE_SELF | IN_MOVE_SELF)) or b".interceptor-" not in name
            return found
        return False
