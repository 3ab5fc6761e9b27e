"""A bounded pool of large pipes: what splice(2) keeps bytes in between two sockets. Knows no sockets."""

from __future__ import annotations

import fcntl
import os
import time

F_SETPIPE_SZ = 1031  # linux/fcntl.h
# A pipe of 128 KiB costs half as much again per byte (0.48 s of CPU per GB against 0.32); 1 MiB is fs.pipe-max-size.
PIPE_SIZE = 1 << 20
# 16,384 pages is fs.pipe-user-pages-soft: all the large pipes a user may have without CAP_SYS_RESOURCE.
LIMIT = 64
# After the kernel has refused one, ask again only then: another process of the user may have given its pipes back.
RETRY_S = 1.0


class Pipe:
    """Two descriptors, and how many bytes are in between."""

    __slots__ = ("filled", "reading", "writing")

    def __init__(self, reading: int, writing: int) -> None:
        self.reading = reading
        self.writing = writing
        self.filled = 0

    def close(self) -> None:
        """Give both descriptors back, and with them what is in the pipe."""
        os.close(self.reading)
        os.close(self.writing)


class PipePool:
    """At most LIMIT pipes, used again and again: making one costs four system calls and a page table of a megabyte."""

    def __init__(self) -> None:
        self._free: list[Pipe] = []
        self._made = 0
        self._not_before = 0.0
        self.refused = 0  # how often somebody had to do without

    def take(self) -> Pipe | None:
        """An empty pipe; None when there are enough already or the kernel gives no more: then the bytes must be copied."""
        if self._free:
            return self._free.pop()
        if self._made < LIMIT and time.monotonic() >= self._not_before:
            pipe = _open()
            if pipe is not None:
                self._made += 1
                return pipe
            self._not_before = time.monotonic() + RETRY_S
        self.refused += 1
        return None

    def give_back(self, pipe: Pipe) -> None:
        """`pipe` is not needed any more. What is left in it must never meet another connection: then it is closed."""
        if pipe.filled:
            pipe.close()
            self._made -= 1
        else:
            self._free.append(pipe)

    def close(self) -> None:
        """Close those that are not in use."""
        self._made -= len(self._free)
        while self._free:
            self._free.pop().close()


def _open() -> Pipe | None:
    try:
        pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return None  # out of descriptors: connections need them more
    try:
        fcntl.fcntl(pipe.writing, F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        # EPERM: over fs.pipe-user-pages-soft. What is left then is one page, and slower than copying.
        pipe.close()
        return None
    return pipe
