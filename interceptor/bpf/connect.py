"""What `--outbound connect` leaves where others find it: its pins, and the map that says where a connection was going.

The layout is that of src/connect.bpf.c. Knows no policy; what writes one is backends/connect.py, what reads this the proxy.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from typing import TypeAlias

from interceptor.bpf import links
from interceptor.bpf.maps import Map
from interceptor.bpf.syscall import BpfError

BPFFS = "/sys/fs/bpf"  # where systemd mounts it, and everybody looks
ORIGINALS = "originals"
SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
SEEN = struct.Struct("=16s4sI2s2s")  # struct seen: client, to, family, client's port, proxy's port
ORIGINAL = struct.Struct("=16s16s2s2sIII")  # struct original: address, proxy's, port, proxy's, family, scope, uid

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Endpoint: TypeAlias = tuple[IpAddress, int]


@dataclass(frozen=True, slots=True)
class Original:
    """Where a connection was going; `scope` is the interface that its socket was bound to, 0 for none."""

    ip: IpAddress
    port: int
    scope: int
    uid: int


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


def root() -> str:
    """The directory that holds ours of every namespace."""
    return os.path.join(BPFFS, "interceptor")


def directory(cookie: int) -> str:
    """Where the maps and links of a namespace are pinned."""
    return os.path.join(root(), str(cookie))


class Originals:
    """The original destinations of a network namespace, by its cookie. Raises BpfError when nothing captures there."""

    def __init__(self, cookie: int) -> None:
        path = os.path.join(directory(cookie), ORIGINALS)
        if not os.path.exists(path):
            raise BpfError(f"{path} is not there: run `interceptor init --outbound connect` here before the proxy")
        self._map: Map = links.open_pinned_map(path)

    def take(self, client: Endpoint, proxy: Endpoint) -> Original | None:
        """Where the connection from `client` to `proxy` was going, once; None when it was not captured. Raises OSError.

        Both as the accepted socket has them, with v4-mapped addresses as IPv4.
        """
        key = _seen(client, proxy)
        found = self._map.lookup(key)
        if found is None:
            return None
        self._map.delete(key)
        packed, _, port, _, family, scope, uid = ORIGINAL.unpack(found)
        ip = ipaddress.IPv4Address(packed[:4]) if family == socket.AF_INET else ipaddress.IPv6Address(packed)
        return Original(ip, int.from_bytes(port, "big"), scope, uid)

    def close(self) -> None:
        """Let the map go."""
        self._map.close()


def _seen(client: Endpoint, proxy: Endpoint) -> bytes:
    is_v4 = client[0].version == 4
    ports = (client[1].to_bytes(2, "big"), proxy[1].to_bytes(2, "big"))
    to = proxy[0].packed if is_v4 else b""
    return SEEN.pack(client[0].packed, to, socket.AF_INET if is_v4 else socket.AF_INET6, *ports)
