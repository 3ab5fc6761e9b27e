"""Named network namespaces as iproute2 makes them (ip-netns(8)), joined by a veth pair. Knows no rule and no proxy."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
from dataclasses import dataclass

from interceptor import launch, links, netns
from interceptor.demo.interrupt import undisturbed
from interceptor.errors import NetnsError

MS_BIND, MS_REC, MS_SHARED, MNT_DETACH = 0x1000, 0x4000, 0x100000, 2  # linux/mount.h
INTERFACE = "eth0"


@dataclass(frozen=True, slots=True)
class Pod:
    """A named network namespace and its two addresses."""

    name: str  # as `ip netns` lists it
    role: str
    v4: ipaddress.IPv4Interface
    v6: ipaddress.IPv6Interface

    @property
    def path(self) -> str:
        return f"{netns.NAMED_DIRECTORY}/{self.name}"


def create(pod: Pod) -> None:
    """Make the namespace, with lo up. Raises NetnsError."""
    with undisturbed():
        here = os.open(netns.CURRENT, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _prepare_directory()
            os.close(os.open(pod.path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
            launch.unshare(launch.CLONE_NEWNET)
            try:
                links.set_up("lo")
                # What holds it: a namespace without a process lives as long as it is mounted.
                _mount(netns.CURRENT, pod.path, MS_BIND)
            finally:
                netns.enter_for_good(f"/proc/self/fd/{here}")
        except OSError as error:
            raise NetnsError(f"creating the network namespace {pod.name}: {error.strerror}") from error
        finally:
            os.close(here)


def remove(pod: Pod) -> None:
    """Take the name away; the namespace goes with its last process. Fine when there is none."""
    with contextlib.suppress(OSError):  # nothing is mounted there
        _unmount(pod.path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(pod.path)


def connect(one: Pod, other: Pod) -> None:
    """A veth pair between the two, both ends called eth0, addresses usable at once."""
    ends = [os.open(pod.path, os.O_RDONLY | os.O_CLOEXEC) for pod in (one, other)]
    try:
        with netns.entered(one.path):
            links.add_veth_pair(links.End(INTERFACE), links.End(INTERFACE, ends[1]))
    finally:
        for end in ends:
            os.close(end)
    for pod in (one, other):
        with netns.entered(pod.path):
            links.add_address(INTERFACE, pod.v4)
            links.add_address(INTERFACE, pod.v6)
            links.set_up(INTERFACE)
    for pod in (one, other):
        with netns.entered(pod.path):
            links.wait_until_running(INTERFACE)


def _prepare_directory() -> None:
    os.makedirs(netns.NAMED_DIRECTORY, mode=0o755, exist_ok=True)
    # As `ip netns add` does, so that a namespace removed here is gone in every mount namespace.
    try:
        _mount("none", netns.NAMED_DIRECTORY, MS_SHARED | MS_REC)
    except OSError:
        _mount(netns.NAMED_DIRECTORY, netns.NAMED_DIRECTORY, MS_BIND | MS_REC)
        _mount("none", netns.NAMED_DIRECTORY, MS_SHARED | MS_REC)


def _mount(source: str, target: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (source.encode(), target.encode(), b"none", ctypes.c_ulong(flags), None)
    if libc.mount(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _unmount(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(path.encode(), MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
