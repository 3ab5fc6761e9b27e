"""PROXY headers: what HAProxy and nginx read in ours, and what our strict reader does."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.proxy.proxy_protocol import PP2_ALPN, PP2_AUTHORITY, V2_SIZE, Version, header, names, v1, v2
from interceptor.sockets import Address
from tests.proxy.read_proxy_protocol import Header, NotProxyProtocol, read

DEADLINE_S = 10.0
V4 = (Address(ip_address("192.0.2.1"), 40000), Address(ip_address("198.51.100.7"), 443))
V6 = (Address(ip_address("2001:db8::1"), 40000), Address(ip_address("2001:db8::7"), 443))
PORTS = st.integers(0, 65535)
ENDS_V4 = st.builds(Address, st.ip_addresses(v=4), PORTS)
ENDS_V6 = st.builds(Address, st.ip_addresses(v=6), PORTS)
TLVS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=100)), max_size=5)


def test_version_1_is_the_line_of_the_specification() -> None:
    assert v1(*V4) == b"PROXY TCP4 192.0.2.1 198.51.100.7 40000 443\r\n"
    assert v1(*V6) == b"PROXY TCP6 2001:db8::1 2001:db8::7 40000 443\r\n"


def test_version_2_is_the_bytes_of_the_specification() -> None:
    start = "0d0a0d0a000d0a515549540a 21 11 000c"
    assert v2(*V4) == bytes.fromhex(start + "c0000201 c6336407 9c40 01bb")
    assert v2(*V4, [(4, b"")])[14:16] == b"\x00\x0f"


@given(st.one_of(st.tuples(ENDS_V4, ENDS_V4), st.tuples(ENDS_V6, ENDS_V6)), st.sampled_from(["v1", "v2"]))
def test_addresses_survive(ends: tuple[Address, Address], version: Version) -> None:
    sent = header(version, *ends)

    assert read(sent + b"GET /") == Header(*ends, len(sent))
    assert {read(sent[:size]) for size in range(len(sent))} == {None}


@given(ENDS_V4, ENDS_V6, TLVS)
def test_mixed_families_are_told_mapped_by_version_2_and_left_out_by_version_1(
    v4: Address, v6: Address, tlvs: list[tuple[int, bytes]]
) -> None:
    sent = v2(v4, v6, tlvs)

    mapped = Address(IPv6Address(f"::ffff:{v4.ip}"), v4.port)
    assert read(sent) == Header(mapped, v6, len(sent), tuple(tlvs))
    assert read(v1(v6, v4)) == Header(None, None, len(v1(v6, v4)))


def test_names_are_told_in_tlvs() -> None:
    found = read(v2(*V4, names("a.example", "h2,http/1.1")))

    assert found is not None
    assert found.tlvs == ((PP2_ALPN, b"h2"), (PP2_AUTHORITY, b"a.example"))
    assert names(None, None) == []


def test_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        v2(*V4, [(4, bytes(V2_SIZE))])


@given(st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", v2(*V4)[:13], v2(*V6)[:16]]), st.binary(max_size=120))
def test_the_reader_takes_asks_or_refuses_any_bytes(prefix: bytes, stream: bytes) -> None:
    try:
        found = read(prefix + stream)
    except NotProxyProtocol:
        return
    assert found is None or found.size <= len(prefix + stream)


@pytest.mark.parametrize(
    "stream",
    [
        b"GET /",
        b"PROXX",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 040000 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 40000 70000\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.7 40000 443\r\n",
        b"PROXY TCP4  192.0.2.1 198.51.100.7 40000 443\r\n",
        b"PROXY " + b"x" * 101,
        v2(*V4)[:12] + b"\x11",
        v2(*V4)[:13] + b"\x11\x00\x0b" + bytes(11),
        v2(*V4)[:13] + b"\x11\x00\x0e" + bytes(14),
    ],
)
def test_the_reader_is_strict(stream: bytes) -> None:
    with pytest.raises(NotProxyProtocol):
        read(stream)


HAPROXY = """
global
    maxconn 100
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
frontend f
    bind 127.0.0.1:{port} accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst] %[dst_port] %[fc_pp_authority]"
"""
NGINX = """
daemon off; master_process off; pid {directory}/nginx.pid; error_log /dev/null;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
    uwsgi_temp_path {directory}; scgi_temp_path {directory};
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        location / {{
            set $source "$proxy_protocol_addr $proxy_protocol_port";
            return 200 "$source $proxy_protocol_server_addr $proxy_protocol_server_port ";
        }}
    }}
}}
"""


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module", params=["haproxy", "nginx"])
def receiver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A server that answers with what the header told it: `source port destination port authority`."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed; the specification's own bytes are compared above")
    directory = tmp_path_factory.mktemp(request.param)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = Path(directory, "conf")
    text = HAPROXY if request.param == "haproxy" else NGINX
    config.write_text(text.format(port=port, directory=directory))
    argv = ["haproxy", "-q", "-db", "-f"] if request.param == "haproxy" else ["nginx", "-c"]
    with subprocess.Popen([*argv, str(config)]) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not is_listening(port):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield request.param, port
        finally:
            process.terminate()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("ends", [V4, V6], ids=["v4", "v6"])
def test_other_programs_read_our_headers(receiver: tuple[str, int], ends: tuple[Address, Address], version: Version) -> None:
    name, port = receiver
    tlvs = names("a.example", None) if version == "v2" else []
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as sock, sock.makefile("rb") as file:
        sock.sendall(header(version, *ends, tlvs) + b"GET / HTTP/1.0\r\n\r\n")
        answer = file.read().decode().rpartition("\r\n\r\n")[2]

    source, destination = ends
    authority = "a.example" if (name, version) == ("haproxy", "v2") else ""
    assert answer == f"{source.ip} {source.port} {destination.ip} {destination.port} {authority}"
