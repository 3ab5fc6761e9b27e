"""The number that names a network namespace's pins. Light: with places.py what the static CNI plugin needs of bpf."""

from __future__ import annotations

import socket
import struct

from interceptor.bpf.syscall import BpfError

SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14


def netns_cookie() -> int:
    """The number of the calling thread's network namespace, never given again while the machine runs.

    Raises BpfError before Linux 5.14.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return netns_cookie_of(any_socket)


def netns_cookie_of(sock: socket.socket) -> int:
    """The number of the network namespace that `sock` is in. Raises BpfError before Linux 5.14."""
    try:
        return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])
    except OSError as error:
        raise BpfError(f"SO_NETNS_COOKIE: {error.strerror}; --outbound connect needs Linux 5.14") from error
