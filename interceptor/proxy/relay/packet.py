"""Packet splice: client and server hold one TCP connection, translated in the kernel, while the proxy sleeps.

The proxy accepts, decides where to, tells `before_connect`, and connects. The programs of interceptor/bpf/src arm the flow when
the server answers; from then on both sockets are silent and only keep their ports. What cannot be armed comes back by
`on_refused`, as two ordinary connections. Knows no configuration, no event loop (its owner polls `fileno` and calls `on_timer`
when `timeout_s` has passed), and not where programs are attached.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from interceptor.proxy.conntrack import Conntrack
from interceptor.proxy.relay import packet_layout as layout
from interceptor.proxy.relay.packet_attach import LOOPBACK, Attached
from interceptor.proxy.relay.packet_layout import Asked, Client, Ends, Mode, PathEntry, State
from interceptor.sockets import Address

SO_COOKIE = 57  # asm-generic/socket.h
TCP_REPAIR = 19  # linux/tcp.h
TCP_INFO_SIZE = 232  # struct tcp_info up to and with tcpi_snd_wnd (Linux 5.4)
TCPI_OPT_TIMESTAMPS = 1
TCP_ESTABLISHED = 1  # net/tcp_states.h
TIMESTAMPS_SIZE = 12
# The last acknowledgement may be lost: the other end repeats its FIN after its RTO, 200 ms and more. As long the upstream
# socket stays, for its port: an application that got it would be mistaken for the flow.
LINGER_S = 0.5
# A RST is believed when nobody has answered it for so long.
RST_LINGER_S = 1.0
# Ends are not urgent; read together they cost one wake-up, not one each.
BATCH_S = 0.01
# By then the server has long answered (or connect() is still trying): whose answer took another way shows.
ARM_CHECK_S = 1.0
SWEEP_S = 15.0
# The upstream forwards them without hearing acknowledgements: less than ten segments (RFC 6928) of the smallest usual size.
PEEK_LIMIT = 8192


@dataclass(frozen=True, slots=True)
class Ended:
    """How a spliced flow ended: bytes as its ends sent them, each counted once, and when (CLOCK_MONOTONIC seconds)."""

    sent: int
    received: int
    at_s: float
    ends: Ends

    @property
    def is_reset(self) -> bool:
        """Whether by RST, not by FINs."""
        return bool(self.ends & layout.RST)


class Spliced:
    """A flow given to the splicer: two sockets that it keeps until the end. `owner` is the giver's."""

    __slots__ = ("asked", "client", "flow_id", "owner", "upstream")

    def __init__(self, flow_id: int, client: socket.socket, upstream: socket.socket, asked: Asked, owner: object) -> None:
        self.flow_id = flow_id
        self.client = client
        self.upstream = upstream
        self.asked = asked
        self.owner = owner


class PacketSplicer:
    """All spliced flows of one proxy process.

    on_ended: the flow is over; its sockets are the splicer's to close.
    on_refused: it could not be spliced, for this reason; both sockets are the caller's again, ordinary ones.
    idle_timeout_s: None, or after how long without a packet a flow is reset.
    """

    def __init__(
        self,
        attached: Attached,
        on_ended: Callable[[Spliced, Ended], None],
        on_refused: Callable[[Spliced, str], None],
        idle_timeout_s: float | None = None,
    ) -> None:
        self.refused: Counter[str] = Counter()
        self._on_ended = on_ended
        self._on_refused = on_refused
        self._idle_ns = None if idle_timeout_s is None else int(idle_timeout_s * 1e9)
        self._attached = attached
        maps = attached.maps
        self._flows, self._paths, self._silent, self._accepted = (
            maps[name] for name in ("flows", "paths", "silent", "accepted")
        )
        self._listeners = maps["listeners"]
        self._ring = attached.events()
        self._conntrack = Conntrack()
        self._spliced: dict[int, Spliced] = {}
        self._checks: deque[tuple[float, int]] = deque()
        self._resets: deque[tuple[float, int]] = deque()
        self._buried: deque[tuple[float, Spliced]] = deque()
        self._read_at: float | None = None
        self._sweep_at = time.monotonic() + SWEEP_S

    def fileno(self) -> int:
        """Readable (poll it edge-triggered) when there are events."""
        return self._ring.fileno()

    def __len__(self) -> int:
        return len(self._spliced)

    def prepare_listener(self, listener: socket.socket, limit: int, mtu: int) -> None:
        """What `listener` accepts may be spliced. Call before listen().

        limit: how many bytes a client may say before its server is connected: 0 when nothing of them is looked at, else up
        to PEEK_LIMIT.
        mtu: the smallest of the devices', which a client behind lo must keep to.
        """
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mtu - (40 if listener.family == socket.AF_INET else 60))
        # Both sockets hear nothing while spliced: keepalive would declare them dead.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        self._listeners.update(layout.PORT.pack(listener.getsockname()[1]), layout.LIMIT.pack(limit))

    def before_connect(
        self, client: socket.socket, upstream: socket.socket, asked: Asked, owner: object, *, limit_mss: bool = False
    ) -> Spliced:
        """Splice these two when `upstream` is connected, which the caller does next.

        asked: HELD when the client was accepted with limit 0. With FORWARDS the caller passes what it received (and then its
        EOF) on to `upstream` as soon as that is writable (`forward` does), and then no more.
        limit_mss: keep the server to segments that the client takes; when the server is behind lo and the client is not.
        Raises OSError, with nothing left behind.
        """
        flow_id = _cookie(upstream)
        known = _client(client)
        if limit_mss:
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, known.mss)
        self._flows.update(layout.COOKIE.pack(flow_id), layout.pack_flow(known, asked))
        made = self._spliced[flow_id] = Spliced(flow_id, client, upstream, asked, owner)
        self._checks.append((time.monotonic() + ARM_CHECK_S, flow_id))
        return made

    def forward(self, spliced: Spliced, peeked: bytes = b"") -> None:
        """The upstream is connected: pass on `peeked` (what was read of the client before) and what else it has said.

        No more can follow: by now the client talks to the server. What does not fit was not acknowledged, and the client
        says it again.
        """
        try:
            while chunk := spliced.client.recv(PEEK_LIMIT):
                peeked += chunk
            is_over = True
        except (BlockingIOError, ConnectionError):
            is_over = False
        with suppress(BlockingIOError, ConnectionError):
            went = not peeked or spliced.upstream.send(peeked) == len(peeked)
            if went and is_over:
                spliced.upstream.shutdown(socket.SHUT_WR)

    def withdraw(self, spliced: Spliced) -> None:
        """The upstream could not be connected: both sockets are the caller's again, and nothing holds the client."""
        if self._spliced.pop(spliced.flow_id, None) is not None:
            self._forget(spliced.flow_id)
            self.release(spliced.client)

    def release(self, client: socket.socket) -> None:
        """Let an accepted client speak: it is not going to be spliced."""
        key = layout.COOKIE.pack(_cookie(client))
        entry = self._accepted.lookup(key)
        if entry is None:
            return
        if entry[layout.ACCEPTED_MODE_AT] == Mode.LIMITED:
            at = layout.ACCEPTED_MODE_AT
            self._accepted.update(key, entry[:at] + bytes([Mode.OPENING]) + entry[at + 1 :])
            # Coming out of repair, the kernel sends a window probe; the program makes it a window update.
            with suppress(OSError):  # reset meanwhile: nobody waits
                client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
                client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        self._accepted.delete(key)

    def on_readable(self) -> None:
        """There are events. Behind a refusal a client waits: read now. Ends can wait for more of their kind.

        While records are left unread, the programs wake us for refusals alone.
        """
        first = self._ring.peek()
        if self._read_at is not None or (first is not None and layout.unpack_event(first).kind == layout.EVENT_REFUSED):
            self._read_events()
        elif first is not None:
            self._read_at = time.monotonic() + BATCH_S

    def timeout_s(self) -> float | None:
        """In how many seconds `on_timer` wants to be called; None for never."""
        times = [queue[0][0] for queue in (self._checks, self._resets, self._buried) if queue]
        if self._read_at is not None:
            times.append(self._read_at)
        if self._idle_ns is not None and self._spliced:
            times.append(self._sweep_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def on_timer(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        if self._read_at is not None and self._read_at <= now:
            self._read_events()
        while self._checks and self._checks[0][0] <= now:
            self._check_armed(self._checks.popleft()[1])
        while self._resets and self._resets[0][0] <= now:
            self._check_reset(self._resets.popleft()[1])
        while self._buried and self._buried[0][0] <= now:
            self._bury(self._buried.popleft()[1])
        if self._idle_ns is not None and self._sweep_at <= now:
            self._sweep_at = now + SWEEP_S
            self._expire()

    def close(self) -> None:
        """Stop: with pinned links the flows go on without us, otherwise they are reset."""
        self._ring.close()
        self._conntrack.close()
        self._attached.close()

    def _read_events(self) -> None:
        self._read_at = None
        for record in self._ring.read():
            event = layout.unpack_event(record)
            spliced = self._spliced.get(event.flow)
            if spliced is None:
                continue
            if event.kind == layout.EVENT_REFUSED:
                self._refuse(spliced, layout.REFUSALS[event.reason])
            elif event.ends & layout.RST:
                # Not believed at once: a forged RST is answered, and the flow goes on (RFC 5961 3).
                self._resets.append((time.monotonic() + RST_LINGER_S, event.flow))
            else:
                self._end(spliced, Ended(event.sent, event.received, event.ended_ns / 1e9, Ends(event.ends)))
                self._buried.append((time.monotonic() + LINGER_S, spliced))

    def _refuse(self, spliced: Spliced, reason: str) -> None:
        del self._spliced[spliced.flow_id]
        self.refused[reason] += 1
        self._forget(spliced.flow_id)
        self.release(spliced.client)
        self._on_refused(spliced, reason)

    def _end(self, spliced: Spliced, ended: Ended) -> None:
        del self._spliced[spliced.flow_id]
        close_silently(spliced.client)
        self._on_ended(spliced, ended)

    def _check_armed(self, flow_id: int) -> None:
        spliced = self._spliced.get(flow_id)
        if spliced is None:
            return
        entry = self._flows.lookup(layout.COOKIE.pack(flow_id))
        if entry is None or entry[layout.FLOW_STATE_AT] != State.CONNECTING:
            return
        if spliced.upstream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_ESTABLISHED:
            self._refuse(spliced, "route")
        else:
            self._checks.append((time.monotonic() + ARM_CHECK_S, flow_id))

    def _check_reset(self, flow_id: int) -> None:
        spliced = self._spliced.get(flow_id)
        ended = self._final(flow_id) if spliced is not None else None
        if spliced is not None and ended is not None:
            self._end(spliced, ended)
            self._bury(spliced)

    def _bury(self, spliced: Spliced) -> None:
        self._forget(spliced.flow_id)
        close_silently(spliced.upstream)

    def _final(self, flow_id: int) -> Ended | None:
        """How a flow with a RST ended; None when it goes on all the same."""
        key = layout.COOKIE.pack(flow_id)
        raw = self._flows.lookup(key)
        if raw is None:
            return Ended(0, 0, time.monotonic(), Ends(0))
        entry = layout.unpack_flow(raw)
        up, down = self._path(entry.client), self._path(entry.server)
        last_ns = max(up.seen_ns if up else 0, down.seen_ns if down else 0)
        if last_ns > entry.ended_ns + int(RST_LINGER_S / 2 * 1e9):
            alive = bytearray(raw)
            alive[layout.FLOW_STATE_AT] = State.ARMED
            alive[layout.FLOW_ENDS_AT] &= ~layout.RST & 0xFF
            self._flows.update(key, bytes(alive))
            return None
        sent = up.sent - bool(entry.ends & Ends.UP_FIN) if up else 0
        received = down.sent - bool(entry.ends & Ends.DOWN_FIN) if down else 0
        return Ended(sent, received, entry.ended_ns / 1e9, entry.ends)

    def _path(self, packets: bytes) -> PathEntry | None:
        raw = self._paths.lookup(packets)
        return None if raw is None else layout.unpack_path(raw)

    def _forget(self, flow_id: int) -> None:
        """Remove all entries of a flow, in the maps and in conntrack."""
        key = layout.COOKIE.pack(flow_id)
        raw = self._flows.lookup(key)
        if raw is None:
            return
        entry = layout.unpack_flow(raw)
        self._flows.delete(key)
        cookie = layout.COOKIE.pack(entry.client_cookie)
        self._silent.delete(cookie)
        if entry.armed_ns:
            self._accepted.delete(cookie)
        untracked: list[tuple[Address, Address]] = []
        client_ifindex = 0
        for packets in (entry.server, entry.client):
            path = self._path(packets)
            # Ports are used again: the entry may be another flow's by now.
            if path is None or path.flow != flow_id:
                continue
            self._paths.delete(packets)
            if packets == entry.server:
                client_ifindex = path.ifindex
        if not entry.armed_ns:
            return
        if entry.ifindex != LOOPBACK:
            server, proxy = layout.unpack_tuple(entry.server)
            untracked.append((proxy, server))
        if client_ifindex not in (0, LOOPBACK):
            untracked.append(layout.unpack_tuple(entry.client))
        if untracked:
            self._conntrack.forget(untracked)

    def _expire(self) -> None:
        now = time.monotonic_ns()
        for flow_id in list(self._spliced):
            raw = self._flows.lookup(layout.COOKIE.pack(flow_id))
            if raw is None or raw[layout.FLOW_STATE_AT] != State.ARMED:
                continue
            entry = layout.unpack_flow(raw)
            paths = [path for path in (self._path(entry.client), self._path(entry.server)) if path]
            last = max([entry.armed_ns, *(path.seen_ns for path in paths)])
            if self._idle_ns is not None and now - last > self._idle_ns:
                self._reset(self._spliced[flow_id], paths)

    def _reset(self, spliced: Spliced, paths: list[PathEntry]) -> None:
        raise NotImplementedError


def close_silently(sock: socket.socket) -> None:
    """Close without a packet: the peer is in a conversation with somebody else."""
    with suppress(OSError):  # it is dead already
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    sock.close()


def _cookie(sock: socket.socket) -> int:
    return int(layout.COOKIE.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0])


def _client(sock: socket.socket) -> Client:
    """Raises OSError when the client is gone."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    if len(info) < TCP_INFO_SIZE:
        raise OSError(errno.EOPNOTSUPP, "TCP_INFO without tcpi_snd_wnd: packet splice needs Linux 5.4")
    (mss,) = struct.unpack_from("=I", info, 16)
    (window,) = struct.unpack_from("=I", info, 228)
    scale = info[6] & 15
    has_timestamps = bool(info[5] & TCPI_OPT_TIMESTAMPS)
    packets = layout.pack_tuple(sock.getpeername()[:2], sock.getsockname()[:2])
    return Client(
        _cookie(sock), packets, min(mss + TIMESTAMPS_SIZE * has_timestamps, 0xFFFF), min(window >> scale, 0xFFFF), scale
    )
