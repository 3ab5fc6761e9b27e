"""The admin port: what it answers, whom it refuses, and that nobody can keep it from answering others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from interceptor.errors import ProxyError
from interceptor.proxy import admin_http, metrics
from interceptor.proxy.admin import MAX_FLOWS, State, open_admin
from interceptor.proxy.admin_http import MAX_CONNECTIONS, MAX_HEAD

DEADLINE_S = 10.0


@dataclass
class FakeProxy:
    """A proxy as the admin server sees it."""

    state: State = "serving"
    flows: list[Mapping[str, Any]] = field(default_factory=list)
    region: metrics.Region = field(default_factory=metrics.Region)

    def totals(self) -> list[int]:
        return self.region.totals()

    def workers(self) -> Mapping[int, int]:
        return {0: os.getpid()}

    def open_flows(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.flows)

    def config(self) -> Mapping[str, Any]:
        return {"outbound_port": {"value": "15001", "origin": "default"}}

    def drain(self) -> None:
        self.state = "draining"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def administered(proxy: FakeProxy) -> Iterator[int]:
    """An admin server for `proxy`; its port."""
    port = free_port()
    server = open_admin(port, ("v4", "v6"), proxy)
    server.start()
    try:
        yield port
    finally:
        server.close()


def ask(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and body, by urllib."""
    at = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(f"http://{at}:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def dialled(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)


def everything(sock: socket.socket) -> bytes:
    with sock, sock.makefile("rb") as file:
        return file.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_metrics_are_prometheus_text(host: str) -> None:
    proxy = FakeProxy()
    proxy.region.worker(0).add(metrics.REFUSED, "direct_dial", count=3)
    with administered(proxy) as port:
        status, body = ask(port, "/metrics", host=host)

    families = {family.name: family for family in text_string_to_metric_families(body)}
    assert status == 200
    refused = {sample.labels["reason"]: sample.value for sample in families["interceptor_connections_refused"].samples}
    assert refused["direct_dial"] == 3
    assert "process_open_fds" in families


@pytest.mark.parametrize(("state", "status"), [("starting", 503), ("serving", 200), ("draining", 503)])
def test_ready_while_serving_alone_and_healthy_all_the_time(state: State, status: int) -> None:
    with administered(FakeProxy(state)) as port:
        assert ask(port, "/readyz") == (status, f"{state}\n")
        assert ask(port, "/healthz") == (200, "ok\n")


def test_drain_is_by_post_and_shows_in_readiness() -> None:
    proxy = FakeProxy()
    with administered(proxy) as port:
        assert ask(port, "/drain")[0] == 405
        assert proxy.state == "serving"
        assert ask(port, "/drain", "POST")[0] == 202
        assert ask(port, "/readyz")[0] == 503


def test_flows_are_bounded() -> None:
    with administered(FakeProxy(flows=[{"client": str(number)} for number in range(MAX_FLOWS + 1)])) as port:
        answer = json.loads(ask(port, "/flows")[1])

    assert len(answer["flows"]) == MAX_FLOWS
    assert answer["more"] is True


def test_config_has_values_and_origins() -> None:
    with administered(FakeProxy()) as port:
        assert json.loads(ask(port, "/config")[1])["outbound_port"] == {"value": "15001", "origin": "default"}


def test_unknown_path_names_those_there_are() -> None:
    with administered(FakeProxy()) as port:
        status, body = ask(port, "/secret")

    assert status == 404
    assert "/metrics" in body.splitlines()


def test_head_has_the_length_and_no_body() -> None:
    with administered(FakeProxy()) as port, dialled(port) as sock:
        sock.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        head = everything(sock)

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 3\r\n" in head
    assert head.endswith(b"\r\n\r\n")


def test_a_fault_in_a_page_is_a_500_and_not_the_end() -> None:
    class Broken(FakeProxy):
        def open_flows(self) -> Iterator[Mapping[str, Any]]:
            raise KeyError("gone")

    with administered(Broken()) as port:
        assert ask(port, "/flows")[0] == 500
        assert ask(port, "/healthz")[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET /" + b"a" * MAX_HEAD, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * MAX_HEAD, 431),
    ],
    ids=["tls", "http2", "long target", "many headers"],
)
def test_what_is_no_request_is_answered_so(sent: bytes, status: int) -> None:
    with administered(FakeProxy()) as port, dialled(port) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_request_in_single_bytes_is_answered() -> None:
    with administered(FakeProxy()) as port, dialled(port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n":
            sock.send(bytes([byte]))
        assert everything(sock).endswith(b"\r\n\r\nok\n")


def test_those_who_never_finish_keep_nobody_from_being_answered() -> None:
    with administered(FakeProxy()) as port:
        slow = [dialled(port) for _ in range(3 * MAX_CONNECTIONS)]
        for sock in slow:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        assert ask(port, "/healthz") == (200, "ok\n")
        # The first of them were displaced: closed without an answer.
        assert everything(slow[0]) == b""
        for sock in slow:
            sock.close()


def test_who_takes_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_http, "DEADLINE_S", 0.05)
    with administered(FakeProxy()) as port, dialled(port) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert everything(sock) == b""


def test_who_does_not_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_http, "DEADLINE_S", 0.2)
    flows: list[Mapping[str, Any]] = [{"command": "x" * 100_000}] * MAX_FLOWS
    with administered(FakeProxy(flows=flows)) as port, dialled(port) as sock:
        sock.sendall(b"GET /flows HTTP/1.1\r\n\r\n")
        deadline = time.monotonic() + DEADLINE_S
        # TCP_INFO's first byte is the state; 1 is ESTABLISHED (net/tcp_states.h).
        while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with administered(FakeProxy()) as port:
        for _ in range(3):
            ask(port, "/healthz")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_taken_port_is_named_and_nothing_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with socket.create_server(("", free_port()), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ProxyError, match=rf"{port} \(admin\): the port is taken"):
            open_admin(port, ("v4", "v6"), FakeProxy())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("arguments", [[], ["--http1.0"], ["--head"]], ids=["1.1", "1.0", "head"])
def test_curl_is_content(arguments: list[str]) -> None:
    with administered(FakeProxy()) as port:
        argv = ["curl", "--silent", "--fail", *arguments, f"http://localhost:{port}/healthz"]
        assert subprocess.run(argv, check=True, capture_output=True, timeout=DEADLINE_S).stdout.strip()


@pytest.mark.netns
def test_from_elsewhere_one_gets_metrics_and_health_alone() -> None:
    from interceptor import netns
    from tests.proxy.pods import V4, V6, pods

    with pods("admin") as made:
        with netns.entered(f"/run/netns/{made.pod}"):
            server = open_admin(15020, ("v4", "v6"), FakeProxy())
        server.start()
        try:
            for address in (V4["pod"], f"[{V6['pod']}]"):
                statuses = {path: curl_status(made.far, "GET", address, path) for path in ("/metrics", "/flows", "/config")}
                assert statuses == {"/metrics": 200, "/flows": 403, "/config": 403}
                assert curl_status(made.far, "POST", address, "/drain") == 403
                # The pod's own address is not its loopback: a neighbour could have that address too.
                assert curl_status(made.pod, "GET", address, "/flows") == 403
            assert curl_status(made.pod, "GET", "127.0.0.1", "/flows") == 200
            assert curl_status(made.pod, "GET", "[::1]", "/flows") == 200
        finally:
            server.close()


def curl_status(where: str, method: str, address: str, path: str) -> int:
    argv = [
        "curl",
        "--silent",
        "--globoff",
        "-X",
        method,
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        f"http://{address}:15020{path}",
    ]
    return int(
        subprocess.run(["ip", "netns", "exec", where, *argv], check=True, capture_output=True, timeout=DEADLINE_S).stdout
    )
