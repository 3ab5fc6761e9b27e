"""Enter a network namespace for a block of straight-line code. Knows nothing about rules or pods.

setns(2) moves the calling thread only. Children inherit the namespace; a thread started inside keeps it. So no thread,
event loop or callback may be started inside `entered`.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from _thread import _local  # threading.local; importing that module takes 1 ms
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from interceptor.errors import NetnsError

if TYPE_CHECKING:
    from ctypes import CDLL

CLONE_NEWNET = 0x40000000  # linux/sched.h
NS_GET_NSTYPE = 0xB703  # linux/nsfs.h: _IO(0xb7, 0x3)
SIOCSIFFLAGS = 0x8914  # linux/sockios.h
IFF_UP = 0x1  # linux/if.h
NAMED_DIRECTORY = "/run/netns"  # where iproute2 keeps named namespaces (ip-netns(8))
# /proc/self/ns/net is the main thread's; only thread-self tells the truth in a worker thread.
CURRENT = "/proc/thread-self/ns/net"
HOST_ONLY_SYSCTL = "/proc/sys/net/core/netdev_max_backlog"
NET_SYSCTLS = "/proc/sys/net"
LOCK_WAIT_S = 20.0
LOCK_POLL_S = 0.02


class _Thread(_local):
    """Where a thread is: another object for each stay in a namespace."""

    stay: object = None


_thread = _Thread()


def stay() -> object:
    """The calling thread's stay in its namespace: a socket that was opened during another one belongs to another namespace."""
    return _thread.stay


def locate(name: str) -> str:
    """The path of the network namespace `name`: a path (it holds a slash), a pid, or a name known to iproute2.

    Raises NetnsError when a name cannot be one; whether the path leads anywhere shows at entry.
    """
    if "/" in name:
        return name
    if name.isascii() and name.isdigit():
        return f"/proc/{name}/ns/net"
    if name in ("", ".", ".."):
        raise NetnsError(f"--netns: {name!r} is neither a name, a path nor a pid")
    return f"{NAMED_DIRECTORY}/{name}"


def identity(path: str = CURRENT) -> tuple[int, int]:
    """(device, inode) of the namespace at `path`: two paths lead to one namespace if these are equal."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise NetnsError(f"network namespace {path}: {error.strerror}") from error
    return found.st_dev, found.st_ino


def is_host() -> bool:
    """Whether the calling thread is in the host's own (the initial) network namespace.

    The kernel shows machine-wide sysctls, like netdev_max_backlog, in the initial namespace alone
    (net/core/sysctl_net_core.c). Comparing with pid 1 would be wrong in a pod, where pid 1 is the pod's own.
    Where no sysctl can be seen (proc mounted with subset=pid) nothing tells: then yes, to be safe.
    """
    return os.path.exists(HOST_ONLY_SYSCTL) or not os.path.isdir(NET_SYSCTLS)


def require(path: str) -> None:
    """Raise NetnsError unless `path` leads to a network namespace; whether it may be entered shows at entry."""
    os.close(_open_namespace(path))


@contextmanager
def locked() -> Iterator[None]:
    """Run the block while no other process of ours changes the calling thread's network namespace.

    The lock is on the namespace itself: it holds between containers, and ends with its process. Any program in the
    namespace could take it, and must not keep us from mending: after LOCK_WAIT_S the block runs all the same.
    """
    try:
        descriptor = os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetnsError(f"network namespace {CURRENT}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while not _try_lock(descriptor) and time.monotonic() < deadline:
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def entered(path: str | None) -> Iterator[None]:
    """Run the block in the network namespace at `path`; None means where we are.

    Raises NetnsError when `path` is missing, is not a network namespace, or may not be entered. When the way back
    fails the process is aborted: code that goes on in the wrong namespace is worse than no code.
    """
    if path is None:
        yield
        return
    with _coming_back():
        enter_for_good(path)
        yield


@contextmanager
def thrown_away() -> Iterator[None]:
    """Run the block in a new network namespace with lo up, which is gone with all that is in it afterwards.

    Raises NetnsError where it cannot be made: that needs CAP_SYS_ADMIN. Otherwise as `entered`.
    """
    with _coming_back():
        _unshare()
        _thread.stay = object()
        _loopback_up()
        yield


@contextmanager
def _coming_back() -> Iterator[None]:
    back, before = os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC), _thread.stay
    try:
        yield
    finally:
        if _thread.stay is not before:
            try:
                _setns(back, CURRENT)
            except NetnsError:
                os.abort()
            _thread.stay = before
        os.close(back)


def _unshare() -> None:
    import ctypes  # 1 ms; Python 3.11 has no os.unshare

    if _libc().unshare(CLONE_NEWNET) != 0:
        raise NetnsError(f"making a network namespace: {os.strerror(ctypes.get_errno())}; needs CAP_SYS_ADMIN")


def _loopback_up() -> None:
    import socket  # 5 ms, and only here
    import struct

    request = struct.pack("=16sH14x", b"lo", IFF_UP)  # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


def enter_for_good(path: str) -> None:
    """Move the calling thread to the namespace at `path` and stay: for a child process that ends there."""
    descriptor = _open_namespace(path)
    try:
        _setns(descriptor, path)
        _thread.stay = object()
    finally:
        os.close(descriptor)


def _open_namespace(path: str) -> int:
    # O_NONBLOCK: opening a FIFO that somebody left at the path must not hang.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NetnsError(f"network namespace {path}: {error.strerror}; `ip netns list` shows the named ones") from error
    try:
        kind = fcntl.ioctl(descriptor, NS_GET_NSTYPE) if stat.S_ISREG(os.fstat(descriptor).st_mode) else 0
    except OSError:
        kind = 0
    if kind != CLONE_NEWNET:
        os.close(descriptor)
        raise NetnsError(f"{path} is not a network namespace")
    return descriptor


def _setns(descriptor: int, path: str) -> None:
    # In os since Python 3.12, and in the static plugin (cni/static/main.c), which cannot have ctypes.
    setns = getattr(os, "setns", None) or _ctypes_setns
    try:
        setns(descriptor, CLONE_NEWNET)
    except OSError as error:
        raise NetnsError(f"entering {path}: {error.strerror}; needs CAP_SYS_ADMIN") from error


def _ctypes_setns(descriptor: int, kind: int) -> None:
    import ctypes  # 1 ms

    if _libc().setns(descriptor, kind) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@cache
def _libc() -> CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)
