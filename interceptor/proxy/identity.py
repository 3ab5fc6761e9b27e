"""Become the proxy's own user, keeping only the capabilities that are named. Called once, before any thread is started."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from interceptor.errors import ProxyError

PR_SET_KEEPCAPS = 8  # linux/prctl.h
CAP_NET_ADMIN = 12  # linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522


def become(uid: int, gid: int, capabilities: frozenset[int]) -> None:
    """Set groups, gid and uid for good, with no more than `capabilities` (CAP_*, below 32) left.

    Raises ProxyError when the kernel refuses; the process should then end.
    """
    import ctypes  # used once, and only when told to change user

    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _check(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), ctypes.get_errno)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        _check(libc.capset(_header(), _only(capabilities)), ctypes.get_errno)
    except OSError as error:
        raise ProxyError(f"becoming uid {uid}, gid {gid}: {error.strerror}; needs CAP_SETUID and CAP_SETGID") from error


def _check(status: int, last_errno: Callable[[], int]) -> None:
    if status != 0:
        raise OSError(last_errno(), os.strerror(last_errno()))


def _header() -> bytes:
    return struct.pack("=Ii", CAPABILITY_VERSION_3, 0)


def _only(capabilities: frozenset[int]) -> bytes:
    # Two times {effective, permitted, inheritable}: the low and the high 32 capabilities.
    low = sum(1 << capability for capability in capabilities)
    return struct.pack("=6I", low, low, 0, 0, 0, 0)
