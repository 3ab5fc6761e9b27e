"""The flows of the packet relay as the kernel's maps have them: begin, look at, forget. Knows no event loop and no session."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from socket import AF_INET, IPPROTO_TCP, SO_KEEPALIVE, SO_REUSEADDR, SOL_SOCKET, TCP_INFO, TCP_MAXSEG, SocketType
from typing import NamedTuple

from interceptor.bpf.ringbuf import RingBuffer
from interceptor.proxy.conntrack import Connection, Conntrack
from interceptor.proxy.relay import packet_layout as layout
from interceptor.proxy.relay.packet_attach import LOOPBACK, Attached
from interceptor.proxy.relay.packet_layout import Asked, Client, Ends, FlowEntry, Mode, PathEntry, State

SO_COOKIE = 57  # asm-generic/socket.h
TCP_REPAIR = 19  # linux/tcp.h
TCP_REPAIR_OFF_NO_WP = -1
TCP_INFO_SIZE = 232  # struct tcp_info up to and with tcpi_snd_wnd (Linux 5.4)
TCP_INFO_READ = struct.Struct("=5xBB9xI208xI")  # tcpi_options, tcpi_snd_wscale and tcpi_rcv_wscale, tcpi_snd_mss, tcpi_snd_wnd
TCPI_OPT_TIMESTAMPS = 1
MAXSEG_LIMIT = 32767  # MAX_TCP_WINDOW, what the kernel takes for TCP_MAXSEG
TIMESTAMPS_SIZE = 12  # in every segment's options, which the MSS option does not count (RFC 6691)


class Counts(NamedTuple):
    """Bytes of a flow so far, as their ends sent them, each counted once; when each last said anything but RST.

    Times are CLOCK_MONOTONIC nanoseconds.
    """

    sent: int
    received: int
    client_seen_ns: int
    server_seen_ns: int


class FlowTable:
    """All flows of one worker process."""

    def __init__(self, attached: Attached, worker: int) -> None:
        self._attached = attached
        maps = attached.maps
        self._flows, self._paths, self._silent, self._accepted, self._listeners = (
            maps[name] for name in ("flows", "paths", "silent", "accepted", "listeners")
        )
        self._conntrack = Conntrack()
        self._untracked: list[Connection] = []
        self.worker = worker
        self.workers = attached.workers
        self.keeps_flows = attached.pins is not None
        # Fewer workers than before: the flows of those that are no more have to be somebody's.
        self.rings: list[RingBuffer] = [
            attached.events(index) for index in range(worker, len(attached.rings), attached.workers)
        ]

    def prepare_listener(self, listener: SocketType, limit: int) -> None:
        """What `listener` accepts may be spliced; `limit` bytes a client may say before its server is connected."""
        # A client behind lo must not send larger segments than the devices take. IP and TCP headers are 40 bytes, or 60.
        mtu = self._attached.mtu
        listener.setsockopt(IPPROTO_TCP, TCP_MAXSEG, mtu - (40 if listener.family == AF_INET else 60))
        # Both sockets hear nothing while spliced: keepalive would declare them dead.
        listener.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 0)
        self._listeners.update(layout.PORT.pack(listener.getsockname()[1]), layout.LIMIT.pack(limit))

    def leave_listener(self, port: int) -> None:
        """What is accepted at `port` is not to be spliced any more."""
        self._listeners.delete(layout.PORT.pack(port))

    def begin(self, client: SocketType, upstream: SocketType, asked: Asked) -> int:
        """Have the flow of these two armed when `upstream`, not connected yet, is answered; its id.

        Raises OSError, with nothing left behind.
        """
        flow_id = cookie_of(upstream)
        known = _client(client)
        # The server must not send larger segments than the client takes: the two may have different devices.
        upstream.setsockopt(IPPROTO_TCP, TCP_MAXSEG, min(known.mss, MAXSEG_LIMIT))
        self._flows.update(layout.COOKIE.pack(flow_id), layout.pack_flow(known, asked, self.worker))
        return flow_id

    def refusal(self, flow_id: int) -> str | None:
        """Why the flow, whose upstream is connected, was not armed; None when it was."""
        raw = self._flows.lookup(layout.COOKIE.pack(flow_id))
        state = State.CONNECTING if raw is None else raw[layout.FLOW_STATE_AT]
        if raw is None or state == State.CONNECTING:
            return "route"  # the server's answer came where no program is, or translated
        return layout.REFUSALS[raw[layout.FLOW_REASON_AT]] if state == State.REFUSED else None

    def counts(self, flow_id: int) -> Counts:
        """How much has gone which way; zeros when the flow is not there."""
        raw = self._flows.lookup(layout.COOKIE.pack(flow_id))
        if raw is None:
            return Counts(0, 0, 0, 0)
        entry = layout.unpack_flow(raw)
        up, down = self._path(entry.client), self._path(entry.server)
        return Counts(
            up.sent - bool(entry.ends & Ends.UP_FIN) if up else 0,
            down.sent - bool(entry.ends & Ends.DOWN_FIN) if down else 0,
            up.seen_ns if up else 0,
            down.seen_ns if down else 0,
        )

    def all_flows(self) -> Iterator[tuple[int, FlowEntry]]:
        """Every flow of every worker."""
        for key, raw in self._flows.items():
            yield int(layout.COOKIE.unpack(key)[0]), layout.unpack_flow(raw)

    def is_client_local(self, entry: FlowEntry) -> bool:
        """Whether the client is behind lo: the flow is an outbound one."""
        down = self._path(entry.server)
        return down is None or down.ifindex == LOOPBACK

    def end_of(self, flow_id: int, entry: FlowEntry) -> layout.Event:
        """The event of a flow that is over already."""
        counts = self.counts(flow_id)
        names = (entry.client_cookie, entry.client, entry.server)
        return layout.Event(flow_id, counts.sent, counts.received, entry.ended_ns, *names, entry.ends, LOOPBACK, LOOPBACK)

    def acknowledged(self, flow_id: int) -> int:
        """How many bytes (a FIN counts as one) the server has acknowledged."""
        raw = self._flows.lookup(layout.COOKIE.pack(flow_id))
        entry = None if raw is None else layout.unpack_flow(raw)
        down = None if entry is None else self._path(entry.server)
        return 0 if entry is None or down is None else (down.acked - entry.isn - 1) & 0xFFFFFFFF

    def revive(self, flow_id: int) -> None:
        """The RST that ended the flow was not believed by its receiver."""
        key = layout.COOKIE.pack(flow_id)
        raw = self._flows.lookup(key)
        if raw is not None:
            alive = bytearray(raw)
            alive[layout.FLOW_STATE_AT] = State.ARMED
            alive[layout.FLOW_ENDS_AT] &= ~(layout.RST | Ends.REPORTED) & 0xFF
            self._flows.update(key, bytes(alive))

    def silence(self, sock: SocketType, flow_id: int) -> None:
        """`sock` keeps the upstream's port from now on, and is to be as silent."""
        self._silent.update(layout.COOKIE.pack(cookie_of(sock)), layout.COOKIE.pack(flow_id))

    def release(self, client: SocketType) -> None:
        """Let an accepted client speak: it is not going to be spliced."""
        try:
            key = layout.COOKIE.pack(cookie_of(client))
        except OSError:
            return  # closed
        entry = self._accepted.lookup(key)
        if entry is None:
            return
        at = layout.ACCEPTED_MODE_AT
        if entry[at] == Mode.LIMITED:
            self._accepted.update(key, entry[:at] + bytes([Mode.OPENING]) + entry[at + 1 :])
            # Coming out of repair, the kernel sends a window probe; the program makes it a window update.
            with suppress(OSError):  # reset meanwhile: nobody waits
                client.setsockopt(IPPROTO_TCP, TCP_REPAIR, 1)
                client.setsockopt(IPPROTO_TCP, TCP_REPAIR, 0)
                # Which repair has taken away: in TIME_WAIT it would keep the next proxy from the listener's port.
                client.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        self._accepted.delete(key)

    def forget(self, flows: Iterable[int], keepers: Iterable[int] = ()) -> None:
        """Remove these flows from the maps; `forget_tracked` must follow. `keepers`: cookies that were silenced."""
        for flow_id in flows:
            self._remove(flow_id)
        for cookie in keepers:
            self._silent.delete(layout.COOKIE.pack(cookie))

    def forget_ended(self, events: list[layout.Event]) -> None:
        """As `forget`, for flows whose two sockets have kept their ports until now: nothing in the maps can be another's."""
        self._flows.delete_all([layout.COOKIE.pack(event.flow) for event in events])
        self._paths.delete_all([names for event in events for names in (event.client, event.server)])
        for event in events:
            # The programs do so themselves, at any other end.
            if event.ends & layout.RST:
                self._silent.delete(layout.COOKIE.pack(event.client_cookie))
            self._untrack(event.client, event.client_ifindex, event.server, event.server_ifindex)

    def forget_tracked(self) -> None:
        """Have conntrack forget what `forget` has; before the upstreams are closed, whose ports others would get."""
        if self._untracked:
            self._conntrack.forget(self._untracked)
            self._untracked = []

    def let_go(self) -> None:
        """Give back what is this table's own."""
        for ring in self.rings:
            ring.close()
        self._conntrack.close()

    def close(self) -> None:
        """Give everything back; the programs go on as long as others have them."""
        self.let_go()
        self._attached.close()

    def _path(self, packets: bytes) -> PathEntry | None:
        raw = self._paths.lookup(packets)
        return None if raw is None else layout.unpack_path(raw)

    def _remove(self, flow_id: int) -> None:
        key = layout.COOKIE.pack(flow_id)
        raw = self._flows.lookup(key)
        if raw is None:
            return
        entry = layout.unpack_flow(raw)
        self._flows.delete(key)
        if not entry.armed_ns:
            self._remove_path(entry.server, flow_id)
            return
        cookie = layout.COOKIE.pack(entry.client_cookie)
        # At an end, the programs have done so already.
        if entry.state != State.ENDED:
            self._accepted.delete(cookie)
        if entry.state != State.ENDED or entry.ends & layout.RST:
            self._silent.delete(cookie)
        down = self._remove_path(entry.server, flow_id)
        self._remove_path(entry.client, flow_id)
        # A port that is another connection's by now: conntrack's entry is that one's too.
        if down is not None:
            self._untrack(entry.client, down.ifindex, entry.server, entry.ifindex)

    def _untrack(self, client: bytes, client_ifindex: int, server: bytes, server_ifindex: int) -> None:
        """Note the connections that conntrack will not see the end of: their packets never got to netfilter."""
        if server_ifindex != LOOPBACK:
            self._untracked.append(_connection(server[16:32], server[:16], server[34:], server[32:34]))
        if client_ifindex != LOOPBACK:
            self._untracked.append(_connection(client[:16], client[16:32], client[32:34], client[34:]))

    def _remove_path(self, packets: bytes, flow_id: int) -> PathEntry | None:
        # Ports are used again: the entry may be another flow's by now.
        path = self._path(packets)
        if path is None or path.flow != flow_id:
            return None
        self._paths.delete(packets)
        return path


def fall_silent(sock: SocketType) -> None:
    """From now on nothing is sent when it is closed, not even when the process is killed (tcp_close with TCP_REPAIR)."""
    with suppress(OSError):  # it is dead already
        sock.setsockopt(IPPROTO_TCP, TCP_REPAIR, 1)


def speak_again(sock: SocketType) -> None:
    """Undo fall_silent, without the window probe that it is usually undone with."""
    with suppress(OSError):  # as above
        sock.setsockopt(IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)


def cookie_of(sock: SocketType) -> int:
    """The kernel's number for a socket, never used twice."""
    return int(layout.COOKIE.unpack(sock.getsockopt(SOL_SOCKET, SO_COOKIE, 8))[0])


def _connection(source: bytes, destination: bytes, source_port: bytes, destination_port: bytes) -> Connection:
    """Parts of a struct tuple, as conntrack has them."""
    if source.startswith(layout.MAPPED):
        return source[12:], destination[12:], source_port, destination_port
    return source, destination, source_port, destination_port


def _client(sock: SocketType) -> Client:
    """Raises OSError when the client is gone."""
    info = sock.getsockopt(IPPROTO_TCP, TCP_INFO, TCP_INFO_SIZE)
    if len(info) < TCP_INFO_SIZE:
        raise OSError(errno.EOPNOTSUPP, "TCP_INFO without tcpi_snd_wnd: packet splice needs Linux 5.4")
    options, scales, mss, window = TCP_INFO_READ.unpack(info)
    scale = scales & 15
    if options & TCPI_OPT_TIMESTAMPS:
        mss += TIMESTAMPS_SIZE
    return Client(cookie_of(sock), min(mss, 0xFFFF), min(window >> scale, 0xFFFF), scale)
