"""Addresses and socket options, on loopback sockets: no rules, no namespace of its own."""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import ip_address

import pytest

from interceptor.errors import ProxyError
from interceptor.proxy.dns import parse_resolver
from interceptor.proxy.flows import rfc3339
from interceptor.proxy.netlink import Netlink
from interceptor.proxy.original_dst import DirectDial, refuse_loop
from interceptor.sockets import Address, address, decode_sockaddr

V4 = Address(ip_address("192.0.2.1"), 443)
V6 = Address(ip_address("2001:db8::1"), 443)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 443, V4.ip.packed), V4),
        (struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16s", 443, 0, V6.ip.packed) + bytes(4), V6),
        (
            struct.pack("=H", socket.AF_INET6)
            + struct.pack("!HI16s", 443, 0, ip_address("::ffff:192.0.2.1").packed)
            + bytes(4),
            V4,
        ),
    ],
    ids=["v4", "v6", "v4-mapped"],
)
def test_a_kernel_address_is_decoded(raw: bytes, expected: Address) -> None:
    assert decode_sockaddr(raw) == expected


@pytest.mark.parametrize("raw", [b"", b"\2", bytes(16), struct.pack("=H", socket.AF_INET6) + bytes(14)])
def test_what_is_no_address_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="a socket address of"):
        decode_sockaddr(raw)


@pytest.mark.parametrize(
    ("value", "text"),
    [(V4, "192.0.2.1:443"), (V6, "[2001:db8::1]:443"), (Address(ip_address("fe80::1"), 1, 2), "[fe80::1%2]:1")],
    ids=["v4", "v6", "link-local"],
)
def test_an_address_is_written_as_in_a_url(value: Address, text: str) -> None:
    assert str(value) == text


def test_a_link_local_name_loses_the_interface_name_and_keeps_its_index() -> None:
    assert address(("fe80::1%lo", 5, 0, 1)) == Address(ip_address("fe80::1"), 5, 1)


def test_the_owner_of_a_connection_is_the_kernels_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        kernel = Netlink()
        owner = kernel.owner(socket.IPPROTO_TCP, address(near.getsockname()), address(near.getpeername()))
        kernel.close()
        assert owner is not None
        assert (owner.uid, owner.inode) == (os.getuid(), os.fstat(near.fileno()).st_ino)


def test_the_owner_of_a_datagram_socket_is_found_although_the_kernel_swaps_its_ends() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
        near.connect(("127.0.0.1", 9))
        kernel = Netlink()
        owner = kernel.owner(socket.IPPROTO_UDP, address(near.getsockname()), address(near.getpeername()))
        kernel.close()
        assert owner is not None
        assert owner.inode == os.fstat(near.fileno()).st_ino


def test_nobody_listens_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = address(listener.getsockname())
    kernel = Netlink()
    assert kernel.listener_owner(socket.IPPROTO_TCP, free) is None
    kernel.close()


@pytest.mark.parametrize(
    ("ip", "expected"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("192.0.2.1", False), ("2001:db8::1", False)]
)
def test_own_addresses_are_told_from_others(ip: str, expected: bool) -> None:
    kernel = Netlink()
    assert kernel.is_local(ip_address(ip)) is expected
    kernel.close()


@pytest.mark.parametrize("ip", ["127.0.0.1", "10.0.0.1"])
def test_our_ports_on_our_addresses_would_loop(ip: str) -> None:
    with pytest.raises(DirectDial, match="is the proxy itself"):
        refuse_loop((ip, 15001), frozenset({15001}), lambda _ip: True)


@pytest.mark.parametrize(("port", "own"), [(80, True), (15001, False)], ids=["other port", "other host"])
def test_other_ports_and_other_hosts_do_not_loop(port: int, own: bool) -> None:
    asked: list[object] = []

    def is_local(ip: object) -> bool:
        asked.append(ip)
        return own

    refuse_loop(("10.0.0.1", port), frozenset({15001}), is_local)
    assert bool(asked) is not own  # an address is looked up only for a port of ours


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1", "192.0.2.1:53"),
        ("192.0.2.1:5353", "192.0.2.1:5353"),
        ("2001:db8::1", "[2001:db8::1]:53"),
        ("[2001:db8::1]:5353", "[2001:db8::1]:5353"),
    ],
)
def test_a_resolver_is_parsed(text: str, expected: str) -> None:
    assert str(parse_resolver(text)) == expected


@pytest.mark.parametrize("text", ["", "dns.example", "192.0.2.1:", "192.0.2.1:x", "[::1"])
def test_what_is_no_resolver_is_named(text: str) -> None:
    with pytest.raises(ProxyError, match="resolver"):
        parse_resolver(text)


def test_times_are_utc_to_the_millisecond() -> None:
    assert rfc3339(0.5) == "1970-01-01T00:00:00.500Z"
