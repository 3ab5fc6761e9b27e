"""Put programs where packets and syscalls pass, and pin what must outlive this process. Knows no program by name.

A link is a descriptor: the program is detached when the last descriptor and pin of it are gone (linux/bpf.h, BPF_LINK_CREATE).
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

from interceptor.bpf.maps import Map, opened_map
from interceptor.bpf.programs import Program
from interceptor.bpf.syscall import LINK_CREATE, LINK_DETACH, LINK_UPDATE, OBJ_GET, OBJ_PIN, BpfError, Buffer, bpf, c_string

BPFFS_MAGIC = 0xCAFE4A11  # linux/magic.h
ATTR_SIZE = 64
F_BEFORE = 1 << 3  # BPF_F_BEFORE: in front of all others at this hook
F_AFTER = 1 << 4


@dataclass(frozen=True, slots=True)
class Link:
    """One attached program."""

    descriptor: int

    def close(self) -> None:
        """Detach, unless it is pinned."""
        os.close(self.descriptor)

    def detach(self) -> None:
        """Stop the program now: closing and unpinning only let the kernel do so soon. Linux 5.9. Raises OSError."""
        bpf(LINK_DETACH, struct.pack("=I", self.descriptor))

    def replace(self, program: Program) -> None:
        """Run `program` instead, with no packet in between that sees neither. Raises OSError."""
        bpf(LINK_UPDATE, struct.pack("=IIII", self.descriptor, program.descriptor, 0, 0))


def attach_interface(program: Program, ifindex: int) -> Link:
    """Attach a tcx program to the interface `ifindex`, before any other tcx program there.

    Raises BpfError; tcx came with Linux 6.6.
    """
    try:
        return _create(program, ifindex, F_BEFORE)
    except OSError as error:
        hint = "tcx needs Linux 6.6" if error.errno == errno.EINVAL else "needs CAP_NET_ADMIN"
        raise BpfError(f"attaching BPF program {program.name} to interface {ifindex}: {error.strerror}; {hint}") from error


def attach_cgroup(program: Program, path: str) -> Link:
    """Attach a cgroup program to the cgroup v2 directory `path`. Raises BpfError."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BpfError(f"cgroup {path}: {error.strerror}") from error
    try:
        return _create(program, directory, 0)
    except OSError as error:
        hint = "is it a cgroup v2 directory?" if error.errno == errno.EBADF else "needs CAP_BPF and CAP_NET_ADMIN"
        raise BpfError(f"attaching BPF program {program.name} to cgroup {path}: {error.strerror}; {hint}") from error
    finally:
        os.close(directory)


def _create(program: Program, target: int, flags: int) -> Link:
    attr = struct.pack("=IIII", program.descriptor, target, program.attach_type, flags).ljust(ATTR_SIZE, b"\0")
    return Link(bpf(LINK_CREATE, attr))


def pin(descriptor: int, path: str) -> None:
    """Keep a link, map or program alive under `path`, in a bpffs. Raises BpfError."""
    _at_path(OBJ_PIN, "pinning to", path, descriptor)


def open_pinned_map(path: str) -> Map:
    """The map pinned at `path`. Raises BpfError."""
    return opened_map(_at_path(OBJ_GET, "opening", path))


def open_pinned_link(path: str) -> Link:
    """The link pinned at `path`. Raises BpfError."""
    return Link(_at_path(OBJ_GET, "opening", path))


def unpin(path: str) -> bool:
    """Remove the pin at `path`; whether there was one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def is_bpffs(path: str) -> bool:
    """Whether `path` is in a mounted BPF file system."""
    import ctypes  # 3 ms; Python's statvfs hides f_type

    filled = Buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), ctypes.c_void_p(filled.address)) != 0:
        return False
    return int(struct.unpack_from("=q", filled.content)[0]) == BPFFS_MAGIC  # struct statfs begins with long f_type


def mount_bpffs(path: str) -> None:
    """Mount a bpffs of our own on the directory `path`, which is made if missing. Raises BpfError; needs CAP_SYS_ADMIN."""
    import ctypes  # 3 ms

    os.makedirs(path, mode=0o700, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpffs", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        raise BpfError(f"mounting a bpffs on {path}: {os.strerror(ctypes.get_errno())}; needs CAP_SYS_ADMIN")


def _at_path(command: int, doing: str, path: str, descriptor: int = 0) -> int:
    name = c_string(path)
    try:
        return bpf(command, struct.pack("=QII", name.address, descriptor, 0))
    except OSError as error:
        raise BpfError(f"{doing} {path}: {error.strerror}; is {os.path.dirname(path)} a bpffs?") from error
