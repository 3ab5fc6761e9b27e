"""ClientHellos as OpenSSL writes them, through Python's ssl and curl, and as nobody should write them."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.proxy.client_hello import HELLO_SIZE, MAX_PROTOCOLS, ClientHello, NotTls, client_hello

DEADLINE_S = 10.0


def openssl_hello(name: str | None, protocols: list[str], newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """What Python's ssl sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = newest
    if protocols:
        context.set_alpn_protocols(protocols)
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def vector(size: int, content: bytes) -> bytes:
    return len(content).to_bytes(size, "big") + content


def extension(kind: int, content: bytes) -> bytes:
    return struct.pack("!H", kind) + vector(2, content)


def server_name(name: bytes) -> bytes:
    return extension(0, vector(2, b"\0" + vector(2, name)))


def protocols(*names: bytes) -> bytes:
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


def hello(*extensions: bytes, session: bytes = bytes(32)) -> bytes:
    """A handshake message, without its records."""
    body = b"\x03\x03" + bytes(32) + vector(1, session) + vector(2, b"\x13\x01") + vector(1, b"\0")
    return b"\x01" + vector(3, body + vector(2, b"".join(extensions)))


def records(message: bytes, size: int = 16384) -> bytes:
    return b"".join(b"\x16\x03\x01" + vector(2, message[at : at + size]) for at in range(0, len(message), size))


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("name", ["example.com", "a-b_c.d.example", "x" * 63 + "." + "y" * 63 + ".example", None])
@pytest.mark.parametrize("offered", [[], ["h2", "http/1.1"]], ids=["no alpn", "alpn"])
def test_openssl_agrees(name: str | None, offered: list[str], newest: ssl.TLSVersion) -> None:
    assert client_hello(openssl_hello(name, offered, newest)) == ClientHello(name, tuple(offered), is_encrypted=False)


def test_curl_agrees() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        port = server.getsockname()[1]
        url = f"https://www.interceptor.test:{port}/"
        with subprocess.Popen(["curl", "-sk", "--max-time", "10", "--connect-to", f"::127.0.0.1:{port}", url]) as curl:
            accepted, _ = server.accept()
            with accepted:
                accepted.settimeout(DEADLINE_S)
                stream = b""
                while (found := client_hello(stream)) is None:
                    received = accepted.recv(4096)
                    assert received
                    stream += received
            curl.wait(DEADLINE_S)
    assert found == ClientHello("www.interceptor.test", ("h2", "http/1.1"), is_encrypted=False)


def test_every_beginning_of_a_hello_asks_for_more() -> None:
    stream = openssl_hello("example.com", ["h2"])

    assert [size for size in range(len(stream)) if client_hello(stream[:size]) is not None] == []


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_hello_in_several_records_is_put_together(size: int) -> None:
    message = hello(server_name(b"example.com"))
    stream = records(message, size)

    assert client_hello(stream) == ClientHello("example.com", (), is_encrypted=False)
    assert client_hello(stream[:-1]) is None
    assert client_hello(stream + b"more") == ClientHello("example.com", (), is_encrypted=False)


def test_grease_is_left_out_wherever_it_stands() -> None:
    message = hello(
        extension(0x1A1A, b""), protocols(b"\xba\xba", b"h2"), extension(0xFAFA, b"\0"), server_name(b"example.com")
    )

    assert client_hello(records(message)) == ClientHello("example.com", ("h2",), is_encrypted=False)


def test_the_outer_name_of_an_encrypted_hello_is_told_as_such() -> None:
    message = hello(server_name(b"public.example"), extension(0xFE0D, bytes(200)))

    assert client_hello(records(message)) == ClientHello("public.example", (), is_encrypted=True)


def test_a_hello_without_extensions_has_no_names() -> None:
    body = b"\x03\x01" + bytes(32) + vector(1, b"") + vector(2, b"\0\x2f") + vector(1, b"\0")

    assert client_hello(records(b"\x01" + vector(3, body))) == ClientHello(None, (), is_encrypted=False)


@pytest.mark.parametrize("name", [b"", b"a b", b'a"b', b"\xff\xfe", b"a\0b", b"-x", b"x" * 256, b"[::1]"])
def test_what_is_no_name_is_not_told(name: bytes) -> None:
    assert client_hello(records(hello(server_name(name)))) == ClientHello(None, (), is_encrypted=False)


def test_a_long_list_of_protocols_is_cut() -> None:
    found = client_hello(records(hello(protocols(*(b"p%d" % number for number in range(100))))))

    assert found is not None
    assert len(found.alpn) == MAX_PROTOCOLS


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x80\x2e\x01\x03\x01",  # an SSL 2.0 hello
        b"\x15\x03\x01\x00\x02\x01\x00",  # an alert
        b"\x16\x02",
        b"\x16\x03\x05",
        b"\x16\x03\x01\x00\x00",  # an empty record
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x02",  # a ServerHello
        b"\x16\x03\x01\x40\x00\x01\xff\xff\xff",
        b"\x16\x03\x01\x00\x02\x01\x00\x17\x03",  # application data in the middle
        records(b"\x01" + vector(3, b"\x03\x03")),
        records(hello(extension(0, b"\xff\xff"))),
        records(hello(extension(0, vector(2, b"\0\xff\xff")))),
        records(hello(extension(16, vector(2, b"\xff")))),
        records(hello(b"\0\0\xff\xff")),
    ],
    ids=lambda stream: stream[:8].hex(),
)
def test_what_is_no_hello_is_refused(stream: bytes) -> None:
    with pytest.raises(NotTls):
        client_hello(stream)


def test_a_hello_of_absurd_size_is_refused_by_its_header() -> None:
    with pytest.raises(NotTls):
        client_hello(b"\x16\x03\x01\x40\x00\x01" + (HELLO_SIZE + 1).to_bytes(3, "big"))


@given(st.binary(max_size=300))
def test_any_bytes_are_taken_asked_on_about_or_refused(stream: bytes) -> None:
    for prefix in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x01\x00\x01\x00\x00\xfc\x03\x03" + bytes(32)):
        try:
            found = client_hello(prefix + stream)
        except NotTls:
            continue
        assert found is None or isinstance(found, ClientHello)


HELLO = records(hello(server_name(b"example.com"), protocols(b"h2")), 60)


@given(st.lists(st.tuples(st.integers(0, len(HELLO) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(HELLO)))
def test_a_damaged_hello_tells_a_name_or_none_and_reads_no_further(damage: list[tuple[int, int]], cut: int) -> None:
    stream = bytearray(HELLO)
    for at, value in damage:
        stream[at] = value
    try:
        found = client_hello(bytes(stream[:cut]))
    except NotTls:
        return
    if found is not None:
        assert found.sni is None or found.sni.isascii()
        # What follows has no part in it.
        assert client_hello(bytes(stream[:cut]) + b"\xff" * 50) == found


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_refused_is_refused_whatever_follows(stream: bytes, more: bytes) -> None:
    try:
        client_hello(stream)
    except NotTls:
        with pytest.raises(NotTls):
            client_hello(stream + more)
