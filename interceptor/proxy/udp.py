"""Relay captured UDP (TPROXY): one pair of sockets a flow, replies from the original destination. Parses no payload.

The half towards the client is a transparent socket bound to the original destination and connected to the client: replies leave
with the source the application expects, and the flow's later datagrams may come in there, past the listener.
"""

from __future__ import annotations

import socket
import time
from select import EPOLLIN

from interceptor.proxy.flows import Flow, errno_name
from interceptor.proxy.listeners import BoundListener
from interceptor.proxy.loop import Scheduled
from interceptor.proxy.original_dst import DirectDial, refuse_loop
from interceptor.proxy.runtime import Runtime
from interceptor.proxy.upstream import UpstreamError
from interceptor.sockets import Address, address, original_dst_of, set_transparent

MAX_DATAGRAM = 65535
ANCILLARY_SIZE = 256
# Datagrams taken from one socket in one go.
BATCH = 32
# Each flow has two descriptors; a flood of sources must not take all that TCP needs.
MAX_FLOWS = 4096


class UdpRelay:
    """All flows of one UDP listener."""

    def __init__(self, runtime: Runtime, bound: BoundListener) -> None:
        self._runtime = runtime
        self._bound = bound
        self._flows: dict[tuple[Address, Address], UdpFlow] = {}
        runtime.loop.watch(bound.sock.fileno(), EPOLLIN, self._ready)

    def close(self) -> None:
        """End all flows."""
        for flow in list(self._flows.values()):
            flow.end("drained", None)

    def _ready(self, _events: int) -> None:
        for _ in range(BATCH):
            try:
                datagram, ancillary, _flags, sockaddr = self._bound.sock.recvmsg(MAX_DATAGRAM, ANCILLARY_SIZE)
            except OSError:
                return  # nothing left; or an ICMP error about a reply, which concerns a flow that will time out
            destination = original_dst_of(ancillary)
            if destination is None:
                self._runtime.counters.refused["no_original_dst"] += 1
                continue
            flow = self._flow(address(sockaddr), destination)
            if flow is not None:
                flow.from_client(datagram)

    def _flow(self, client: Address, destination: Address) -> UdpFlow | None:
        flow = self._flows.get((client, destination))
        if flow is not None:
            return flow
        refused = self._runtime.counters.refused
        settings, listener = self._runtime.settings, self._bound.listener
        try:
            refuse_loop(destination, settings.own_ports | {listener.port}, self._bound.view.is_local)
        except DirectDial as error:
            refused[error.reason] += 1
            return None
        if len(self._flows) >= MAX_FLOWS:
            refused["too_many_udp_flows"] += 1
            return None
        try:
            flow = UdpFlow(self._runtime, self._bound, client, destination, self._forget)
        except (OSError, UpstreamError):
            refused["udp_upstream_failed"] += 1
            return None
        self._flows[client, destination] = flow
        return flow

    def _forget(self, client: Address, destination: Address) -> None:
        del self._flows[client, destination]
