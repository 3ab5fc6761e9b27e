"""The least proxy around a PacketSplicer: `python -m tests.proxy.packet_driver JSON`, in the namespace of the pod.

Prints "ready", then one JSON line for each flow that ends and, on SIGTERM, one with counters.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
import threading
from contextlib import suppress

from interceptor.proxy.identity import CAP_NET_ADMIN, become
from interceptor.proxy.relay import packet_attach
from interceptor.proxy.relay.packet import PEEK_LIMIT, Ended, PacketSplicer, Spliced
from interceptor.proxy.relay.packet_layout import Asked
from interceptor.sockets import original_dst_v4, original_dst_v6, reset_on_close, set_transparent

PROXY_UID = 1337
PASSTHROUGH = {socket.AF_INET: "127.0.0.6", socket.AF_INET6: "::6"}


def log(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def pump(source: socket.socket, sink: socket.socket, counts: list[int], slot: int) -> None:
    try:
        while chunk := source.recv(1 << 16):
            counts[slot] += len(chunk)
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (source, sink):
            with suppress(OSError):
                reset_on_close(sock)
                sock.shutdown(socket.SHUT_RD)
            sock.close()


def relay(spliced: Spliced, reason: str) -> None:
    """By threads: what is refused is rare here."""
    counts = [0, 0]

    def both() -> None:
        up = threading.Thread(target=pump, args=(spliced.client, spliced.upstream, counts, 0))
        up.start()
        pump(spliced.upstream, spliced.client, counts, 1)
        up.join()
        spliced.client.close()
        spliced.upstream.close()
        log(relay="copy", reason=reason, sent=counts[0], received=counts[1])

    for sock in (spliced.client, spliced.upstream):
        sock.setblocking(True)
    threading.Thread(target=both, daemon=True).start()


class Driver:
    """One thread, one epoll."""

    def __init__(self, settings: dict[str, object]) -> None:
        self.settings = settings
        self.epoll = select.epoll()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.asked = Asked[str(settings.get("client", "HELD"))]
        self.by_upstream: dict[int, Spliced] = {}
        self.counters = {"accepted": 0, "connect_failed": 0, "fin": 0, "rst": 0}
        self.attached = packet_attach.attach()
        idle = settings.get("idle_timeout_s")
        self.splicer = PacketSplicer(self.attached, self.ended, self.refused, idle)  # type: ignore[arg-type]
        self.epoll.register(self.splicer.fileno(), select.EPOLLIN | select.EPOLLET)
        self.listeners: dict[int, tuple[socket.socket, str, str]] = {}
        mtu = min((device.mtu for device in packet_attach.devices()), default=1500)
        for direction, mechanism, port, family in settings["listeners"]:  # type: ignore[attr-defined]
            self.listen(direction, mechanism, port, socket.AF_INET if family == "v4" else socket.AF_INET6, mtu)
        become(PROXY_UID, PROXY_UID, frozenset({CAP_NET_ADMIN}))

    def listen(self, direction: str, mechanism: str, port: int, family: socket.AddressFamily, mtu: int) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if mechanism == "tproxy":
            set_transparent(sock)
        sock.bind(("", port))
        self.splicer.prepare_listener(sock, 0 if self.asked is Asked.HELD else PEEK_LIMIT, mtu)
        sock.listen(4096)
        sock.setblocking(False)
        self.listeners[sock.fileno()] = (sock, direction, mechanism)
        self.epoll.register(sock.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while True:
            timeout = self.splicer.timeout_s()
            for descriptor, mask in self.epoll.poll(-1 if timeout is None else timeout):
                if descriptor in self.listeners:
                    self.accept(*self.listeners[descriptor])
                elif descriptor == self.splicer.fileno():
                    self.splicer.on_readable()
                elif descriptor in self.by_upstream:
                    self.upstream_event(self.by_upstream[descriptor], mask)
            self.splicer.on_timer()

    def accept(self, listener: socket.socket, direction: str, mechanism: str) -> None:
        for _ in range(16):
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            self.counters["accepted"] += 1
            self.connect(client, direction, mechanism)

    def connect(self, client: socket.socket, direction: str, mechanism: str) -> None:
        client.setblocking(False)
        if mechanism == "tproxy":
            destination = client.getsockname()[:2]
        else:
            address = original_dst_v4(client) if client.family == socket.AF_INET else original_dst_v6(client)
            destination = (str(address.ip), address.port)
        upstream = socket.socket(client.family, socket.SOCK_STREAM)
        upstream.setblocking(False)
        if direction == "inbound":
            upstream.setsockopt(socket.SOL_IP, 24, 1)
            upstream.bind((PASSTHROUGH[client.family], 0))
        try:
            spliced = self.splicer.before_connect(client, upstream, self.asked, None, limit_mss=direction == "inbound")
        except OSError:
            reset_on_close(client)
            client.close()
            upstream.close()
            return
        spliced.owner = upstream.fileno()
        self.by_upstream[upstream.fileno()] = spliced
        self.epoll.register(upstream.fileno(), 0 if self.asked is Asked.HELD else select.EPOLLOUT | select.EPOLLET)
        try:
            upstream.connect(destination)
        except BlockingIOError:
            pass
        except OSError:
            self.connect_failed(spliced)

    def upstream_event(self, spliced: Spliced, mask: int) -> None:
        if mask & (select.EPOLLERR | select.EPOLLHUP):
            self.connect_failed(spliced)
        elif mask & select.EPOLLOUT:
            self.splicer.forward(spliced)

    def connect_failed(self, spliced: Spliced) -> None:
        self.counters["connect_failed"] += 1
        self.forget(spliced)
        self.splicer.withdraw(spliced)
        reset_on_close(spliced.client)
        spliced.client.close()
        spliced.upstream.close()

    def forget(self, spliced: Spliced) -> None:
        self.by_upstream.pop(spliced.owner)  # type: ignore[call-overload]
        if spliced.upstream.fileno() >= 0:
            self.epoll.unregister(spliced.upstream.fileno())

    def ended(self, spliced: Spliced, ended: Ended) -> None:
        self.forget(spliced)
        self.counters["rst" if ended.is_reset else "fin"] += 1
        if not self.settings.get("quiet"):
            log(relay="packet", reason="rst" if ended.is_reset else "fin", sent=ended.sent, received=ended.received)

    def refused(self, spliced: Spliced, reason: str) -> None:
        self.forget(spliced)
        relay(spliced, reason)

    def tell(self) -> None:
        left = {name: len(list(self.attached.maps[name].keys())) for name in ("flows", "paths", "silent", "accepted")}
        log(counters=self.counters | {"refused": dict(self.splicer.refused), "open": len(self.splicer), "left": left})


def main() -> None:
    driver = Driver(json.loads(sys.argv[1]))
    signal.signal(signal.SIGUSR1, lambda *_: driver.tell())
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print("ready", flush=True)
    driver.run()


main()
