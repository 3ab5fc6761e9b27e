"""The one place that calls bpf(2). Speaks `union bpf_attr` as packed bytes; knows no program and no map by name.

ctypes is imported at the first call (it costs 3 ms), so importing this module is free.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from interceptor.errors import InterceptorError

if TYPE_CHECKING:
    import ctypes

# enum bpf_cmd, linux/bpf.h
MAP_CREATE = 0
MAP_LOOKUP_ELEM = 1
MAP_UPDATE_ELEM = 2
MAP_DELETE_ELEM = 3
MAP_GET_NEXT_KEY = 4
PROG_LOAD = 5
OBJ_PIN = 6
OBJ_GET = 7
PROG_TEST_RUN = 10
OBJ_GET_INFO_BY_FD = 15
MAP_FREEZE = 22
MAP_DELETE_BATCH = 27
LINK_CREATE = 28
LINK_UPDATE = 29
LINK_DETACH = 34

# The numbers of syscall(2) itself, which libc gives no name: asm/unistd_64.h, asm-generic/unistd.h.
SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
INFO_SIZE = 256  # more than any struct bpf_*_info of today; the kernel fills what it knows


class BpfError(InterceptorError):
    """The kernel refuses a program, a map or a link; says which, and why as far as the kernel says."""


class Buffer:
    """Memory with an address the kernel can be told: what pointers in `union bpf_attr` point at."""

    __slots__ = ("_memory", "address", "size")

    def __init__(self, content: bytes | int) -> None:
        import ctypes  # 3 ms

        size = content if isinstance(content, int) else len(content)
        self._memory: ctypes.Array[ctypes.c_char] = ctypes.create_string_buffer(size)
        self.size = size
        self.address = ctypes.addressof(self._memory)
        if isinstance(content, bytes):
            self._memory.raw = content

    @property
    def content(self) -> bytes:
        """What is there now."""
        return self._memory.raw

    @content.setter
    def content(self, content: bytes) -> None:
        self._memory.raw = content

    @property
    def text(self) -> str:
        """Up to the first NUL: a name or the verifier's log."""
        return self._memory.value.decode(errors="replace")


def c_string(text: str) -> Buffer:
    """`text` with the NUL that the kernel looks for."""
    return Buffer(text.encode() + b"\0")


@functools.cache
def raw_bpf() -> Callable[[int, int, int], int]:
    """bpf(command, address of attr, its size) -> result or -errno. For hot paths that keep their attr; others use `bpf`.

    Raises BpfError on a machine whose syscall number we do not know.
    """
    import ctypes  # 3 ms

    machine = os.uname().machine
    number = SYSCALL_NUMBERS.get(machine)
    if number is None:
        raise BpfError(f"bpf(2) on {machine}: the syscall number is not known; known: {', '.join(SYSCALL_NUMBERS)}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_uint]
    syscall, get_errno = libc.syscall, ctypes.get_errno

    def call(command: int, address: int, size: int) -> int:
        result = int(syscall(number, command, address, size))
        return result if result >= 0 else -get_errno()

    return call


def bpf(command: int, attr: bytes) -> int:
    """Call bpf(2) with `attr`; returns the new descriptor, or 0. Raises OSError with the kernel's errno."""
    buffer = Buffer(attr)
    return checked(raw_bpf()(command, buffer.address, buffer.size))


def checked(result: int) -> int:
    """`result` unless it is a negative errno, which is raised as OSError."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def object_info(descriptor: int) -> bytes:
    """struct bpf_prog_info, bpf_map_info or bpf_link_info of `descriptor`, as the kernel fills it (linux/bpf.h)."""
    import struct

    filled = Buffer(INFO_SIZE)
    bpf(OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", descriptor, INFO_SIZE, filled.address))
    return filled.content
