"""What all flows of one proxy share: the loop, the settings, the seams. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from socket import SocketType

from interceptor.proxy.dns.names import Names
from interceptor.proxy.flows import Flow
from interceptor.proxy.hooks import Hooks
from interceptor.proxy.local_addresses import LocalAddresses
from interceptor.proxy.loop import Loop
from interceptor.proxy.metrics import Counts
from interceptor.proxy.netns_view import NetnsView
from interceptor.proxy.owners import Owners
from interceptor.proxy.relay.base import Relay
from interceptor.proxy.settings import Direction, ProxySettings
from interceptor.proxy.upstream import PASSTHROUGH_V4, PASSTHROUGH_V6, OpenSocket, dial_datagram, open_stream
from interceptor.sockets import Address, SockAddr


@dataclass(slots=True)
class Runtime:
    """The surroundings of a flow."""

    settings: ProxySettings
    loop: Loop
    view: NetnsView
    relay: Relay
    open_socket: OpenSocket
    record: Callable[[Flow], None]  # hands on what is known of a flow that has ended
    owners: Owners
    local_addresses: LocalAddresses
    counts: Counts
    names: Names | None = None  # of addresses, by the answers of our own resolver; None: DNS is not captured
    hooks: Hooks = field(default_factory=Hooks)

    def open_upstream(self, direction: Direction, client: SockAddr, destination: SockAddr) -> SocketType:
        """The upstream half of a TCP flow of `client`, not connected yet. Raises UpstreamError."""
        source = self.inbound_source(client, destination) if direction == "inbound" else None
        return open_stream(self.open_socket, destination, source, self.settings.upstream_mark)

    def dial_datagram(self, destination: Address) -> SocketType:
        """The upstream half of an outbound UDP flow. Raises UpstreamError."""
        return dial_datagram(self.open_socket, destination, self.settings.upstream_mark)

    def inbound_source(self, client: SockAddr, destination: SockAddr) -> SockAddr:
        """Where the inbound leg of `client`'s flow to `destination` comes from; of any port."""
        # A client with an address of our own is the pod calling itself: dialled from there, capture would take it for
        # outbound-to-self and bring it back for ever.
        keeps_client = (
            self.settings.original_source
            and len(client) == len(destination)
            and client[0] != destination[0]
            and not self.local_addresses.has(client)
        )
        if keeps_client:
            return (client[0], 0) if len(client) == 2 else (client[0], 0, 0, client[3])
        return PASSTHROUGH_V4 if len(destination) == 2 else PASSTHROUGH_V6
