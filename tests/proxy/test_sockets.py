"""Addresses and socket options, on loopback sockets: no rules, and but for one test no namespace."""

from __future__ import annotations

import json
import os
import socket
import struct
from ipaddress import ip_address

import pytest

from interceptor import netns
from interceptor.proxy.flows import Flow, rfc3339
from interceptor.proxy.local_addresses import LocalAddresses
from interceptor.proxy.loop import Loop
from interceptor.proxy.netlink import Netlink
from interceptor.proxy.netns_view import NetnsView
from interceptor.proxy.original_dst import DirectDial, refuse_loop
from interceptor.proxy.settings import Listener
from interceptor.sockets import Address, SockAddr, accept, address, decode_sockaddr, normal, sockaddr_text, waiting
from tests.proxy.pods import pods, run

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


@pytest.mark.netns
def test_an_address_that_comes_or_goes_is_noticed() -> None:
    with pods("local") as made:
        with netns.entered(f"/run/netns/{made.pod}"):
            view = NetnsView()
        loop = Loop()
        local = LocalAddresses(view, loop)
        answers = [local.has(("10.77.0.77", 0))]
        for verb in ("add", "del"):
            run("ip", "-n", made.pod, "addr", verb, "10.77.0.77/24", "dev", "eth0")
            loop.run_once()
            answers.append(local.has(("10.77.0.77", 0)))
        loop.close()
        view.close()
    assert answers == [False, True, False]


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


def test_times_are_utc_to_the_millisecond() -> None:
    assert rfc3339(0.5) == "1970-01-01T00:00:00.500Z"


def test_a_record_is_json_whatever_is_in_it() -> None:
    listener = Listener("outbound", "redirect", 15001, "v6")
    client, to = ("fe80::1", 40000, 0, 3), ("2001:db8::1", 80, 0, 0)
    flow = Flow(0.0, "tcp", "outbound", listener, client, to, None, 1, 2, 1.5, "closed", None, 0, 7, 'a "b"\\\n\x01é', "splice")
    assert json.loads(flow.to_json()) == {
        "time": "1970-01-01T00:00:00.000Z",
        "protocol": "tcp",
        "direction": "outbound",
        "listener": "outbound redirect 15001/v6",
        "client": "[fe80::1%3]:40000",
        "original_dst": "[2001:db8::1]:80",
        "upstream_local": None,
        "bytes_sent": 1,
        "bytes_received": 2,
        "duration_ms": 1.5,
        "reason": "closed",
        "error": None,
        "uid": 0,
        "pid": 7,
        "command": 'a "b"\\\n\x01é',
        "relay": "splice",
    } | dict.fromkeys(("connect_ms", "fallback", "sni", "alpn", "host", "dns_name", "dns"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("::ffff:192.0.2.1", 80, 0, 0), ("192.0.2.1", 80)),
        (("::ffff:0:102:304", 80, 0, 0), ("::ffff:0:102:304", 80, 0, 0)),
        (("192.0.2.1", 80), ("192.0.2.1", 80)),
        (("2001:db8::1", 80, 0, 2), ("2001:db8::1", 80, 0, 2)),
    ],
    ids=["v4-mapped", "not v4-mapped", "v4", "v6"],
)
def test_a_v4_mapped_address_is_normally_v4(given: SockAddr, expected: SockAddr) -> None:
    assert normal(given) == expected
    assert sockaddr_text(normal(given)) == str(address(given))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def test_the_quick_way_to_a_connection_s_owner_finds_what_the_general_one_finds(family: socket.AddressFamily) -> None:
    kernel = Netlink()
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as near,
    ):
        local, remote = near.getsockname(), near.getpeername()
        found = kernel.connection_owner(local, remote)
        assert found == kernel.owner(socket.IPPROTO_TCP, address(local), address(remote))
        assert found is not None
        assert found.inode == os.fstat(near.fileno()).st_ino
        assert kernel.connection_owner(("192.0.2.9", 1), ("192.0.2.8", 2)) is None
    kernel.close()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def test_who_waits_at_a_listener_is_counted(family: socket.AddressFamily) -> None:
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        assert waiting(listener) is None
        listener.listen()
        assert waiting(listener) == 0
        clients = [socket.create_connection(listener.getsockname()[:2]) for _ in range(3)]
        assert waiting(listener) == 3
        clients.pop().close()  # it has ended, and is there to be accepted all the same
        accepted = [accept(listener, family)[0] for _ in range(3)]
        assert waiting(listener) == 0
    for sock in (*clients, *accepted):
        sock.close()
