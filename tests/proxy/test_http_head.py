"""Request heads, cut anywhere; the host as curl and urllib write it."""

from __future__ import annotations

import socket
import subprocess
from http.client import HTTPConnection
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.proxy.http_head import NotHttp, host, request_line

DEADLINE_S = 10.0


def seen_host(client: list[str] | None, port: int, server: socket.socket) -> str | None:
    """The host that `curl` with these arguments, or http.client, asks for."""

    def ask() -> None:
        if client is not None:
            subprocess.run(["curl", "-s", "--max-time", "10", *client], check=False)
            return
        connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        connection.request("GET", "/path", headers={"X": "y"})
        connection.close()

    thread = Thread(target=ask)
    thread.start()
    accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(DEADLINE_S)
        stream = b""
        while (found := host(stream)) is None:
            received = accepted.recv(10)
            assert received
            stream += received
    thread.join()
    return found


@pytest.mark.parametrize(
    ("client", "wanted"),
    [
        (["http://127.0.0.1:{port}/"], "127.0.0.1:{port}"),
        (["--connect-to", "::127.0.0.1:{port}", "http://www.interceptor.test/a?b=c"], "www.interceptor.test"),
        (["--http1.0", "--connect-to", "::127.0.0.1:{port}", "http://one.test/"], "one.test"),
        (["--proxy", "http://127.0.0.1:{port}", "http://far.test:81/x"], "far.test:81"),
        (["--proxytunnel", "--proxy", "http://127.0.0.1:{port}", "http://far.test/"], "far.test:80"),
        (["--connect-to", "::127.0.0.1:{port}", "http://[2001:db8::1]:8080/"], "[2001:db8::1]:8080"),
        (["--connect-to", "::127.0.0.1:{port}", "-d", "a=b", "http://post.test/"], "post.test"),
        (None, "127.0.0.1:{port}"),
    ],
)
def test_real_clients(client: list[str] | None, wanted: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        port = server.getsockname()[1]
        given = client and [argument.format(port=port) for argument in client]
        assert seen_host(given, port, server) == wanted.format(port=port)


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (b"GET / HTTP/1.1\r\nHost: a.example\r\n", "a.example"),
        (b"GET / HTTP/1.1\nhOST:a.example\n", "a.example"),
        (b"GET / HTTP/1.1\r\nX: y\r\nHost: \t a.example:8080 \r\nHost: b\r\n", "a.example:8080"),
        (b"GET http://user:pw@a.example:80/x HTTP/1.1\r\nHost: b\r\n", "a.example:80"),
        (b"CONNECT a.example:443 HTTP/1.1\r\n", "a.example:443"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n", "a.example"),
        (b"GET / HTTP/1.0\r\nX: y\r\n\r\n", ""),
        (b"GET / HTTP/1.1\r\nHost:\r\n", ""),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n", ""),
        (b"GET / HTTP/1.1\r\nHost: \xff\r\n", ""),
        (b"GET / HTTP/1.1\r\nHost: " + b"a" * 254 + b"\r\n", ""),
        (b'GET / HTTP/1.1\r\nHost: a"b\r\n', ""),
        (b"GET / HTTP/1.1\r\nHost: a.exam", None),
        (b"GET / HTTP/1.1\r\nX-Host: a\r\n", None),
        (b"GET / HTTP/1.1\r", None),
        (b"GET /long", None),
        (b"GE", None),
        (b"", None),
    ],
)
def test_host(head: bytes, wanted: str | None) -> None:
    assert host(head) == wanted


@pytest.mark.parametrize(
    "head",
    [
        b"\x16",
        b"\0\0\0\x08",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"EHLO x\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/0.9\r\n",
        b"GET  / HTTP/1.1\r\n",
        b"GET /\x01",
        b"GET / FTP",
        b"G" * 25,
        b" ",
    ],
)
def test_what_is_no_request_is_known_at_once(head: bytes) -> None:
    with pytest.raises(NotHttp):
        host(head)


def test_a_request_line_is_split_at_its_spaces() -> None:
    line = request_line(b"POST /a?b HTTP/1.0\r\nrest")

    assert line is not None
    assert (line.method, line.target, line.version, line.end) == ("POST", b"/a?b", (1, 0), 20)


REQUEST = b"GET /path HTTP/1.1\r\nAccept: */*\r\nHost: www.example.com:81\r\n\r\n"


def test_every_beginning_asks_for_more_until_the_host_is_there() -> None:
    known_from = REQUEST.index(b":81\r\n") + 5

    assert {host(REQUEST[:size]) for size in range(known_from)} == {None}
    assert {host(REQUEST[:size]) for size in range(known_from, len(REQUEST) + 1)} == {"www.example.com:81"}


@given(
    st.sampled_from([b"", b"GET ", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost:"]),
    st.binary(max_size=200),
    st.binary(max_size=50),
)
def test_any_bytes_are_decided_once_and_for_all(prefix: bytes, stream: bytes, more: bytes) -> None:
    try:
        found = host(prefix + stream)
    except NotHttp:
        with pytest.raises(NotHttp):
            host(prefix + stream + more)
        return
    if found is not None:
        assert found.isascii()
        assert host(prefix + stream + more) == found
