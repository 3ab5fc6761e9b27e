"""What `--outbound connect` leaves where others find it: its pins, and the map that says where a connection was going.

The layout is that of src/connect.bpf.c. Knows no policy; what writes one is backends/connect.py, what reads this the proxy.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import TypeAlias

from interceptor.bpf import links, places
from interceptor.bpf.maps import Map
from interceptor.bpf.syscall import BpfError

ORIGINALS = "originals"
V4_MAPPED = "::ffff:"  # RFC 4291 2.5.5.2
SEEN = struct.Struct("=16s4sI2s2s")  # struct seen: client, to, family, client's port, proxy's port
ORIGINAL = struct.Struct("=16s16s2s2sIII")  # struct original: address, proxy's, port, proxy's, family, scope, uid

# As the socket module has addresses: (host, port) or (host, port, flow, scope).
SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class Original:
    """Where a connection was going, as the socket module has it, and the user who made it.

    The scope of an IPv6 address is the interface that the socket was bound to, 0 for none.
    """

    address: SockAddr
    uid: int


class Originals:
    """The original destinations of a network namespace, by its cookie. Raises BpfError when nothing captures there."""

    def __init__(self, cookie: int) -> None:
        path = os.path.join(places.connect_directory(cookie), ORIGINALS)
        try:
            os.stat(path)
        except FileNotFoundError as error:
            raise BpfError(f"{path} is not there: run `interceptor init --outbound connect` before the proxy") from error
        except OSError as error:
            raise BpfError(f"{path}: {error.strerror}; start the proxy as root, it becomes its user afterwards") from error
        self._map: Map = links.open_pinned_map(path)

    def find(self, client: SockAddr, proxy: SockAddr) -> Original | None:
        """Where the connection from `client` to `proxy` was going; None when it was not captured. Raises OSError."""
        found = self._map.lookup(_seen(client, proxy))
        if found is None:
            return None
        packed, _, port, _, family, scope, uid = ORIGINAL.unpack(found)
        number = int.from_bytes(port, "big")
        if family == socket.AF_INET:
            return Original((socket.inet_ntoa(packed[:4]), number), uid)
        return Original((socket.inet_ntop(socket.AF_INET6, packed), number, 0, scope), uid)

    def forget(self, client: SockAddr, proxy: SockAddr) -> None:
        """The connection was taken: nobody asks again. Raises OSError."""
        self._map.delete(_seen(client, proxy))

    def close(self) -> None:
        """Let the map go."""
        self._map.close()


def _seen(client: SockAddr, proxy: SockAddr) -> bytes:
    ports = (client[1].to_bytes(2, "big"), proxy[1].to_bytes(2, "big"))
    host, to = client[0].removeprefix(V4_MAPPED), proxy[0].removeprefix(V4_MAPPED)
    if ":" in host:
        return SEEN.pack(socket.inet_pton(socket.AF_INET6, host.partition("%")[0]), b"", socket.AF_INET6, *ports)
    return SEEN.pack(socket.inet_aton(host), socket.inet_aton(to), socket.AF_INET, *ports)
