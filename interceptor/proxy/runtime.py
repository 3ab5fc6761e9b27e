"""What all flows of one proxy share: the loop, the settings, the seams. Decides nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from interceptor.proxy.flows import Counters, Flow
from interceptor.proxy.loop import Loop
from interceptor.proxy.netns_view import NetnsView
from interceptor.proxy.relay.base import Relay
from interceptor.proxy.settings import Direction, ProxySettings
from interceptor.proxy.upstream import PASSTHROUGH_SOURCES, OpenSocket, open_upstream
from interceptor.sockets import Address


@dataclass(slots=True)
class Runtime:
    """The surroundings of a flow."""

    settings: ProxySettings
    loop: Loop
    view: NetnsView
    relay: Relay
    open_socket: OpenSocket
    on_flow: Callable[[Flow], None]
    counters: Counters = field(default_factory=Counters)

    def dial(self, kind: socket.SocketKind, direction: Direction, client: Address, destination: Address) -> socket.socket:
        """The upstream half of a flow of `client`, on its way. Raises UpstreamError."""
        source = self._inbound_source(client, destination) if direction == "inbound" else None
        return open_upstream(self.open_socket, kind, destination, source, self.settings.upstream_mark)

    def record(self, flow: Flow) -> None:
        """Count `flow` as ended and hand it on."""
        self.counters.ended[flow.reason] += 1
        self.on_flow(flow)

    def _inbound_source(self, client: Address, destination: Address) -> Address:
        # A client with an address of our own is the pod calling itself: dialled from there, capture would take it for
        # outbound-to-self and bring it back for ever.
        keeps_client = (
            self.settings.original_source
            and client.ip.version == destination.ip.version
            and client.ip != destination.ip
            and not self.view.netlink.is_local(client.ip)
        )
        return client if keeps_client else PASSTHROUGH_SOURCES[destination.ip.version]
