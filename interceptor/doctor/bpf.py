"""Which BPF hooks this kernel lets us use: tcx at interfaces, connect() in cgroups. Loads two programs that do nothing.

They go with their descriptors. Numbers: linux/bpf.h; system calls: asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

from interceptor.doctor.finding import Finding
from interceptor.errors import NetnsError
from interceptor.netns import thrown_away

SYSCALL = {"x86_64": 321, "aarch64": 280}
BPF_PROG_LOAD = 5
BPF_LINK_CREATE = 28
BPF_PROG_TYPE_SCHED_CLS = 3
BPF_PROG_TYPE_CGROUP_SOCK_ADDR = 18
BPF_CGROUP_INET4_CONNECT = 10
BPF_TCX_INGRESS = 46
LOOPBACK_IFINDEX = 1  # net/net_namespace.h
_LICENSE = b"GPL\0"
_TCX = ("tcx", "moving bytes past the proxy between two handshakes (packet splice)", "needs Linux 6.6 or newer")
_CONNECT = ("connect hook", "capture at connect(), before any packet", "needs CONFIG_CGROUP_BPF")


def findings() -> Iterator[Finding]:
    """Whether each hook can be used by this process, on this kernel."""
    if os.uname().machine not in SYSCALL:
        yield Finding("bpf", "bpf", "unknown", f"not tried on {os.uname().machine}")
        return
    yield _finding(_TCX, _try_tcx)
    yield _finding(_CONNECT, _try_connect)


def _finding(about: tuple[str, str, str], attempt: object) -> Finding:
    name, purpose, needs = about
    assert callable(attempt)
    try:
        attempt()
    except PermissionError:
        return Finding("bpf", name, "unknown", "not tried: needs CAP_BPF and CAP_NET_ADMIN", "run doctor as root")
    except NetnsError as error:
        return Finding("bpf", name, "unknown", f"not tried: {error}", "run doctor as root")
    except OSError as error:
        return Finding("bpf", name, "missing", f"the kernel says: {error.strerror}", f"for {purpose}; {needs}")
    return Finding("bpf", name, "ok", f"can be used, for {purpose}")


def _try_tcx() -> None:
    program = _load(BPF_PROG_TYPE_SCHED_CLS, 0, 0)
    try:
        with thrown_away():
            os.close(_bpf(BPF_LINK_CREATE, struct.pack("=IIII", program, LOOPBACK_IFINDEX, BPF_TCX_INGRESS, 0)))
    finally:
        os.close(program)


def _try_connect() -> None:
    os.close(_load(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT, 1))


def _load(kind: int, attach: int, result: int) -> int:
    """The descriptor of a program that returns `result`. Raises OSError."""
    # struct bpf_insn: code, registers, offset, immediate. r0 = result; exit
    code = ctypes.create_string_buffer(struct.pack("=BBhi", 0xB7, 0, 0, result) + struct.pack("=BBhi", 0x95, 0, 0, 0))
    license_text = ctypes.create_string_buffer(_LICENSE)
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        kind,
        2,  # instructions
        ctypes.addressof(code),
        ctypes.addressof(license_text),
        *(0, 0, 0, 0, 0),  # no log, no version, no flags
        b"doctor",
        0,
        attach,
    )
    return _bpf(BPF_PROG_LOAD, attributes)


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    given = ctypes.create_string_buffer(attributes, len(attributes))
    descriptor = libc.syscall(SYSCALL[os.uname().machine], command, given, len(attributes))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(descriptor)
