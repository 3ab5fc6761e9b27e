"""Which servers are told by a PROXY protocol header whom a connection is from, and what. Opens and sends nothing."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from interceptor.proxy import proxy_protocol
from interceptor.proxy.settings import HeaderFor
from interceptor.sockets import SockAddr, address

if TYPE_CHECKING:
    from interceptor.proxy.connection import Connection


class Announcer:
    """The `preface` hook for these settings."""

    def __init__(self, wanted: HeaderFor) -> None:
        self._version = wanted.version
        self._ports = wanted.ports
        self._networks = wanted.networks

    def __call__(self, connection: Connection) -> bytes:
        """What the upstream of `connection` is to be sent before anything of the client's: often nothing.

        The source port is the client's as it was accepted: where REDIRECT met two connections with the same one, conntrack has
        changed it.
        """
        if not self.is_wanted(connection.direction, connection.original_dst):
            return b""
        names = connection.names
        source, destination = address(connection.client_address), address(connection.original_dst)
        return proxy_protocol.header(self._version, source, destination, proxy_protocol.names(names.sni, names.alpn))

    def is_wanted(self, direction: str, destination: SockAddr) -> bool:
        """Whether that server expects a header. One that does not would take it for the client's first bytes."""
        if direction == "inbound":
            return any(ports.first <= destination[1] <= ports.last for ports in self._ports)
        if direction != "outbound" or not self._networks:
            return False
        ip = ipaddress.ip_address(destination[0])
        return any(ip in network for network in self._networks)
