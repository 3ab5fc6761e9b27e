"""Limits, peeking, PROXY headers and keepalive on real captured connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.proxy.pods import (
    APP_PORT,
    INBOUND,
    OUTBOUND,
    REDIRECT_RULES,
    V4,
    V6,
    Pods,
    client,
    is_reset,
    listen,
    pods,
    proxy,
    run,
)
from tests.proxy.read_proxy_protocol import Header, read
from tests.proxy.test_client_hello import HELLO

pytestmark = pytest.mark.netns
NETS = pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])
LISTENERS = [
    *(("outbound", "redirect", OUTBOUND, family) for family in ("v4", "v6")),
    *(("inbound", "redirect", INBOUND, family) for family in ("v4", "v6")),
]
REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


@pytest.fixture(scope="module")
def world() -> Iterator[Pods]:
    with pods("leaves") as made:
        made.rules(REDIRECT_RULES)
        yield made


def accepted(server: socket.socket) -> socket.socket:
    sock, _ = server.accept()
    sock.settimeout(10)
    return sock


@contextmanager
def outbound(world: Pods, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from the pod to far away, through the proxy: the client's end and the server's."""
    with listen(world.far, V4["far"], port) as server, client(world.pod, V4["far"], port) as near, accepted(server) as far:
        yield near, far


@pytest.mark.parametrize(("said", "names"), [(HELLO, ("example.com", "h2", None)), (REQUEST, (None, None, "a.example"))])
def test_names_are_in_the_record_and_all_bytes_arrive(world: Pods, said: bytes, names: tuple[str | None, ...]) -> None:
    with proxy(world.pod, listeners=LISTENERS, peek=["sni", "host"]) as running:
        with listen(world.far, V4["far"], 7200) as server, client(world.pod, V4["far"], 7200) as near:
            near.sendall(said)
            near.shutdown(socket.SHUT_WR)
            with accepted(server) as far, far.makefile("rb") as file:
                assert file.read() == said
                far.sendall(b"answer")
            assert near.makefile("rb").read() == b"answer"
        flow = running.flow()
    assert (flow["sni"], flow["alpn"], flow["host"]) == names
    assert flow["reason"] == "closed"
    assert flow["bytes_sent"] == len(said)


def test_a_hello_in_two_segments_is_named_and_arrives_whole(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, peek=["sni"]) as running:
        with outbound(world, 7201) as (near, far):
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            near.sendall(HELLO[:40])
            near.sendall(HELLO[40:])
            received = b""
            while len(received) < len(HELLO):
                received += far.recv(4096)
            assert received == HELLO
        assert running.flow()["sni"] == "example.com"


def test_a_server_that_speaks_first_is_heard_by_a_client_that_waits(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, peek=["sni", "host"]) as running:
        with outbound(world, 7202) as (near, far):
            far.sendall(b"220 hello\r\n")
            assert near.recv(100) == b"220 hello\r\n"
            near.sendall(b"QUIT\r\n")
            assert far.recv(100) == b"QUIT\r\n"
        assert running.flow()["host"] is None


@pytest.mark.parametrize("said", [b"", b"GE"], ids=["nothing", "a part"])
@pytest.mark.parametrize("ends", ["client", "server"])
def test_an_end_before_any_name_goes_through(world: Pods, said: bytes, ends: str) -> None:
    with proxy(world.pod, listeners=LISTENERS, peek=["sni", "host"]) as running:
        with outbound(world, 7203) as (near, far):
            near.sendall(said)
            first, second = (near, far) if ends == "client" else (far, near)
            first.shutdown(socket.SHUT_WR)
            assert second.makefile("rb").read() == (said if ends == "client" else b"")
            if ends == "server":
                # Closing with bytes unread would be a reset.
                near.shutdown(socket.SHUT_WR)
                assert far.makefile("rb").read() == said
        flow = running.flow()
    assert (flow["reason"], flow["sni"], flow["host"]) == ("closed", None, None)


def test_an_idle_connection_that_never_said_anything_times_out_while_peeked_at(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, peek=["sni"], idle_timeout_s=0.2) as running, outbound(world, 7204):
        assert running.flow()["reason"] == "idle_timeout"


@NETS
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_application_that_wants_a_header_gets_the_clients_address(world: Pods, net: dict[str, str], version: str) -> None:
    with (
        proxy(world.pod, listeners=LISTENERS, header=[version, str(APP_PORT), ""]),
        listen(world.pod, net["pod"], APP_PORT) as server,
        client(world.far, net["pod"], APP_PORT) as near,
        accepted(server) as app,
    ):
        near.sendall(b"hello")
        header = header_from(app)
        assert app.recv(5) == b"hello"
        local = near.getsockname()
    assert header.source is not None
    assert header.destination is not None
    assert (str(header.source.ip), header.source.port) == local[:2]
    assert (str(header.destination.ip), header.destination.port) == (net["pod"], APP_PORT)


def header_from(sock: socket.socket) -> Header:
    """The header at the start of a stream, byte by byte, so that nothing after it is taken."""
    stream = b""
    while (header := read(stream)) is None:
        received = sock.recv(1)
        assert received
        stream += received
    return header


def test_a_header_comes_before_a_server_that_waits_for_it_speaks(world: Pods) -> None:
    header = ["v1", "", V4["far"]]
    with proxy(world.pod, listeners=LISTENERS, header=header, peek=["sni"]), outbound(world, 7205) as (near, far):
        near.sendall(HELLO)
        assert header_from(far).destination is not None
        far.sendall(b"220\r\n")
        assert near.recv(100) == b"220\r\n"
        assert far.recv(4096) == HELLO


def test_who_is_not_named_gets_no_header(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, header=["v2", "7206", "10.99.0.0/16"]), outbound(world, 7206) as (near, far):
        near.sendall(b"hello")
        assert far.recv(100) == b"hello"


def test_one_connection_too_many_is_refused_and_the_next_has_room_again(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, max_connections=1) as running:
        with listen(world.far, V4["far"], 7207) as server:
            with client(world.pod, V4["far"], 7207), accepted(server):
                assert is_reset(world.pod, V4["far"], 7207)
                refused = running.flow(lambda flow: flow["reason"] == "refused_too_many_connections")
            running.flow(lambda flow: flow["reason"] == "closed")
            with client(world.pod, V4["far"], 7207) as near, accepted(server) as far:
                near.sendall(b"x")
                assert far.recv(1) == b"x"
        running.stop()
    assert refused["original_dst"] == f"{V4['far']}:7207"
    assert running.counters["connections_refused"] == {"too_many_connections": 1}


def test_one_clients_connections_leave_room_for_anothers(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, max_connections_per_client=1) as running:
        with (
            listen(world.pod, V4["pod"], APP_PORT) as server,
            listen(world.pod, V6["pod"], APP_PORT) as server6,
            client(world.far, V4["pod"], APP_PORT),
            accepted(server),
        ):
            assert is_reset(world.far, V4["pod"], APP_PORT)
            with client(world.far, V6["pod"], APP_PORT) as other, accepted(server6) as app:
                other.sendall(b"x")
                assert app.recv(1) == b"x"
        running.stop()
    assert running.counters["connections_refused"] == {"too_many_connections_of_client": 1}


def test_silent_peers_are_asked_whether_they_live(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, keepalive_s=1.0), outbound(world, 7208):
        # The application's own socket has no such timer: these are the proxy's.
        argv = ["ip", "netns", "exec", world.pod, "ss", "-tnoH", "sport", "=", ":15001", "or", "dport", "=", ":7208"]
        deadline = time.monotonic() + 10
        while run(*argv).count("keepalive") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
