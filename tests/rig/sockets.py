"""Sockets that live in a pod and belong to a user, made in the test's own process.

A socket keeps the namespace it was made in, and the filesystem uid of the thread that made it is what owner matches
see (xt_owner.c, nft_meta.c: f_cred->fsuid). setfsuid(2) is per thread, so no child process is needed.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor.netns import entered
from tests.rig.net import Pod

IP_TRANSPARENT = 19  # linux/in.h
IP_RECVORIGDSTADDR = 20  # linux/in.h
IPV6_RECVORIGDSTADDR = 74  # linux/in6.h
IPV6_TRANSPARENT = 75  # linux/in6.h
SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h
SO_MARK = 36  # asm-generic/socket.h

_libc = ctypes.CDLL(None)
for _call in (_libc.setfsuid, _libc.setfsgid):
    _call.argtypes = [ctypes.c_uint]
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
# By number, since glibc's functions change every thread: asm/unistd_64.h, asm-generic/unistd.h.
SETRESUID, SETRESGID = {"x86_64": (117, 119), "aarch64": (147, 149)}[os.uname().machine]
KEEP = 2**32 - 1


@contextmanager
def identity(uid: int, gid: int) -> Iterator[None]:
    """What this thread opens and connects within the block belongs to `uid` and `gid`; it stays root all the same.

    Rules look at the filesystem ids of who opened a socket, BPF programs at the real ids of who connects it.
    """
    _become(uid, gid)
    try:
        yield
    finally:
        _become(0, 0)


def _become(uid: int, gid: int) -> None:
    # Only setfsuid(0) gives the capabilities of root's file access back (capabilities(7)); setresuid changes it silently.
    _libc.setfsuid(0)
    _libc.syscall(SETRESGID, gid, KEEP, KEEP)
    _libc.syscall(SETRESUID, uid, KEEP, KEEP)
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)


def split(where: str) -> tuple[str, int]:
    """ "10.0.0.1:80" or "[fd00::1]:80" -> address and port."""
    address, _, port = where.rpartition(":")
    return address.strip("[]"), int(port)


def join(address: str, port: int) -> str:
    """The other way round; v4-mapped and zone forms as they are."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def open_socket(
    pod: Pod,
    kind: socket.SocketKind,
    where: str,
    *,
    uid: int = 0,
    gid: int = 0,
    mark: int = 0,
    source: str | None = None,
    transparent: bool = False,
) -> socket.socket:
    """A socket of `where`'s family, in `pod`, of this owner; bound to `source` (address:port) if given."""
    family = socket.AF_INET if ipaddress.ip_address(split(where)[0]).version == 4 else socket.AF_INET6
    with entered(pod.path), identity(uid, gid):
        opened = socket.socket(family, kind)
    try:
        if mark:
            opened.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        if transparent:
            set_transparent(opened)
        if source is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(split(source))
    except OSError:
        opened.close()
        raise
    return opened


def set_transparent(sock: socket.socket) -> None:
    """Let `sock` be bound to, or get connections for, addresses that are not the pod's."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)


def name_of(address: tuple[object, ...]) -> str:
    """A socket module address as text."""
    return join(str(address[0]), int(str(address[1])))
