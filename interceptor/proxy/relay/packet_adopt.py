"""Take over flows whose proxy process is gone: two sockets that keep their ports again, made without a packet.

The flows went on meanwhile; only their ends would have gone unnoticed, and their ports might have been given to others.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from interceptor.proxy.relay import packet_layout as layout
from interceptor.proxy.relay.packet_layout import FlowEntry, State
from interceptor.proxy.relay.packet_table import FlowTable, fall_silent
from interceptor.sockets import Address, SockAddr, set_freebind, set_transparent


@dataclass(frozen=True, slots=True)
class Adopted:
    """A flow of an earlier process: `client` and `upstream` keep its ports. Times are CLOCK_MONOTONIC seconds."""

    flow_id: int
    client: socket.SocketType
    upstream: socket.SocketType
    client_address: SockAddr
    original_dst: SockAddr
    is_inbound: bool
    entry: FlowEntry

    @property
    def began(self) -> float:
        """When it was armed."""
        return self.entry.armed_ns / 1e9


def adopt(table: FlowTable, worker: int, workers: int) -> Iterator[Adopted]:
    """All flows that are this worker's share. Those that were never armed are forgotten."""
    for flow_id, entry in table.all_flows():
        if entry.worker % workers != worker:
            continue
        if entry.state not in (State.ARMED, State.ENDED):
            table.forget([flow_id])
            continue
        far_client, near_client = layout.unpack_tuple(entry.client)
        server, near_server = layout.unpack_tuple(entry.server)
        is_inbound = not table.is_client_local(entry)
        yield Adopted(
            flow_id,
            _keeper(table, flow_id, near_client, far_client),
            _keeper(table, flow_id, near_server, server),
            _sockaddr(far_client),
            _sockaddr(near_client if is_inbound else server),
            is_inbound,
            entry,
        )


def _keeper(table: FlowTable, flow_id: int, local: Address, remote: Address) -> socket.SocketType:
    sock = socket.SocketType(local.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    table.silence(sock, flow_id)
    fall_silent(sock)
    # The dead process's socket may still be there, waiting for an answer to its FIN: it keeps the port as well.
    with suppress(OSError):
        set_transparent(sock)
        set_freebind(sock)
        sock.bind(_sockaddr(local))
        sock.connect(_sockaddr(remote))
    return sock


def _sockaddr(address: Address) -> SockAddr:
    return (str(address.ip), address.port) if address.ip.version == 4 else (str(address.ip), address.port, 0, address.scope)
