"""Real connections, captured by real rules in network namespaces, both families."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from interceptor import netns
from interceptor.config import Config
from interceptor.proxy.configured import settings
from interceptor.proxy.listeners import open_listeners
from interceptor.proxy.original_dst import ClientGone, original_dst_of
from interceptor.proxy.settings import Listener
from tests.proxy.pods import (
    APP_PORT,
    INBOUND,
    ORIGINAL_SOURCE_RULES,
    OUTBOUND,
    PROBE_PORT,
    REDIRECT_RULES,
    TPROXY_RULES,
    V4,
    V6,
    Pods,
    client,
    is_reset,
    listen,
    pods,
    proxy,
)

pytestmark = pytest.mark.netns
NETS = pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])
FAMILIES = ("v4", "v6")
REDIRECT = {
    "listeners": [
        *(("outbound", "redirect", OUTBOUND, family) for family in FAMILIES),
        *(("inbound", "redirect", INBOUND, family) for family in FAMILIES),
    ]
}
TPROXY = {
    "listeners": [
        *(("outbound", "tproxy", OUTBOUND, family) for family in FAMILIES),
        *(("inbound", "tproxy", INBOUND, family) for family in FAMILIES),
    ]
}
# What a test's client says and its server answers.
PING, PONG = b"ping", b"pong, pong"


@pytest.fixture(scope="module")
def redirecting() -> Iterator[Pods]:
    """A pod whose TCP is brought to the proxy by REDIRECT."""
    with pods("redirect") as made:
        made.rules(REDIRECT_RULES)
        yield made


@pytest.fixture(scope="module")
def tproxying() -> Iterator[Pods]:
    """A pod whose inbound TCP and outbound UDP are brought to the proxy by TPROXY."""
    with pods("tproxy") as made:
        made.rules(TPROXY_RULES + ORIGINAL_SOURCE_RULES)
        made.policy_routes()
        yield made


def text(ip: str, port: int) -> str:
    """An address as the flow record writes it."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def converse(near: socket.socket, listener: socket.socket) -> str:
    """PING there, PONG back, FIN both ways; whom the server saw."""
    with near, listener:
        near.sendall(PING)
        near.shutdown(socket.SHUT_WR)
        accepted, peer = listener.accept()
        with accepted:
            assert accepted.makefile("rb").read() == PING
            accepted.sendall(PONG)
        assert near.makefile("rb").read() == PONG
    return str(peer[0])


@NETS
def test_outbound_redirect_reaches_the_original_destination(redirecting: Pods, net: dict[str, str]) -> None:
    with proxy(redirecting.pod, **REDIRECT) as running:
        server = listen(redirecting.far, net["far"], 7000)
        near = client(redirecting.pod, net["far"], 7000)
        local = near.getsockname()
        assert converse(near, server) == net["pod"]
        flow = running.flow()
    assert flow["original_dst"] == text(net["far"], 7000)
    assert flow["client"] == text(local[0], local[1])
    assert (flow["direction"], flow["reason"]) == ("outbound", "closed")
    assert (flow["bytes_sent"], flow["bytes_received"]) == (len(PING), len(PONG))
    assert flow["uid"] == os.getuid()


def test_the_process_behind_an_outbound_flow_is_found(redirecting: Pods) -> None:
    # A proxy that may look into other users' processes: root, known to the rules by its mark, not its uid.
    redirecting.rules("insert rule inet px out meta mark 7 return")
    program = f"import socket; socket.create_connection(('{V4['far']}', 7001)).recv(1)"
    with proxy(redirecting.pod, **REDIRECT, run_as=None, upstream_mark=7) as running:
        with listen(redirecting.far, V4["far"], 7001) as server:
            child = subprocess.Popen(["ip", "netns", "exec", redirecting.pod, sys.executable, "-c", program])
            accepted, _ = server.accept()
            accepted.close()
            child.wait()
        flow = running.flow()
    assert (flow["uid"], flow["pid"]) == (0, child.pid)
    assert flow["command"].startswith(f"{sys.executable} -c import socket")


@NETS
def test_inbound_redirect_reaches_the_application_from_the_passthrough_address(redirecting: Pods, net: dict[str, str]) -> None:
    with proxy(redirecting.pod, **REDIRECT) as running:
        server = listen(redirecting.pod, net["pod"], APP_PORT)
        near = client(redirecting.far, net["pod"], APP_PORT)
        assert converse(near, server) in ("127.0.0.6", "::6")
        flow = running.flow()
    assert flow["original_dst"] == text(net["pod"], APP_PORT)
    assert (flow["direction"], flow["reason"]) == ("inbound", "closed")
    assert flow["client"].startswith(net["far"].join("[]") if ":" in net["far"] else net["far"])
    assert flow["uid"] == 0


@NETS
def test_a_dual_stack_listener_recovers_both_families(redirecting: Pods, net: dict[str, str]) -> None:
    with proxy(redirecting.pod, listeners=[("outbound", "redirect", OUTBOUND, "dual")]) as running:
        server = listen(redirecting.far, net["far"], 7002)
        converse(client(redirecting.pod, net["far"], 7002), server)
        assert running.flow()["original_dst"] == text(net["far"], 7002)


@NETS
def test_a_refused_upstream_resets_the_client(redirecting: Pods, net: dict[str, str]) -> None:
    with proxy(redirecting.pod, **REDIRECT) as running:
        assert is_reset(redirecting.pod, net["far"], 7003)
        flow = running.flow()
    assert (flow["reason"], flow["error"]) == ("connect_failed", "connect: ECONNREFUSED")


def test_an_upstream_that_does_not_answer_times_out(redirecting: Pods) -> None:
    # A black hole: the neighbour does not exist, and the connect timer is shorter than the kernel's patience.
    with proxy(redirecting.pod, **REDIRECT, connect_timeout_s=0.2) as running:
        assert is_reset(redirecting.pod, "10.77.0.99", 7003)
        assert running.flow()["reason"] == "connect_timeout"


@NETS
@pytest.mark.parametrize("port", [OUTBOUND, INBOUND])
@pytest.mark.parametrize("dialler", ["pod", "far"])
def test_a_direct_dial_is_refused_and_counted(redirecting: Pods, net: dict[str, str], port: int, dialler: str) -> None:
    with proxy(redirecting.pod, **REDIRECT) as running:
        # From the pod, the loopback address: it is what the rules leave alone.
        loopback = "::1" if ":" in net["pod"] else "127.0.0.1"
        where, ip = (redirecting.pod, loopback) if dialler == "pod" else (redirecting.far, net["pod"])
        assert is_reset(where, ip, port)
        running.flow()
        assert running.stop() == 0
    assert running.counters["connections_refused"] == {"direct_dial": 1}
    assert len(running.flows) == 1


@NETS
def test_a_captured_dial_of_our_own_port_is_refused(redirecting: Pods, net: dict[str, str]) -> None:
    with proxy(redirecting.pod, **REDIRECT) as running:
        assert is_reset(redirecting.pod, net["pod"], INBOUND)
        assert running.flow()["reason"] == "refused_direct_dial"


def test_without_conntrack_entries_the_error_has_its_name() -> None:
    with pods("bare") as bare, proxy(bare.pod, **REDIRECT) as running:
        assert is_reset(bare.far, V4["pod"], OUTBOUND)
        assert running.flow()["reason"] == "refused_no_conntrack_entry"


@NETS
def test_a_client_that_reset_before_it_was_accepted_is_not_called_a_missing_entry(net: dict[str, str]) -> None:
    # Without rules there is no conntrack entry at all, as after a reset that conntrack forgets at once.
    with pods("gone") as bare, listen(bare.pod, net["pod"], OUTBOUND) as listener:
        near = client(bare.far, net["pod"], OUTBOUND)
        accepted, _ = listener.accept()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        near.close()
        with accepted:
            assert select.select([accepted], [], [], 5)[0]
            with pytest.raises(ClientGone):
                original_dst_of(Listener("outbound", "redirect", OUTBOUND, "v6" if ":" in net["pod"] else "v4"))(accepted)


def test_dns_is_listened_for_when_nothing_else_is_captured(redirecting: Pods) -> None:
    config = Config(outbound="off", inbound="off", dns="all")
    with netns.entered(f"/run/netns/{redirecting.pod}"):
        bound = open_listeners(settings(config, FAMILIES))
    found = {(each.listener.direction, each.protocol, each.listener.family, each.sock.getsockname()[1]) for each in bound}
    for each in bound:
        each.close()
    bound[0].view.close()

    assert found == {("dns", protocol, family, 15053) for protocol in ("tcp", "udp") for family in FAMILIES}


@NETS
def test_a_probe_is_answered_by_the_proxy(redirecting: Pods, net: dict[str, str]) -> None:
    with proxy(redirecting.pod, **REDIRECT), client(redirecting.pod, net["far"], PROBE_PORT) as near:
        near.sendall(b"who took me?")
        answer = json.loads(near.makefile("rb").read())
    assert answer["original_dst"] == text(net["far"], PROBE_PORT)
    assert answer["listener"].startswith("outbound redirect")


def test_a_missing_passthrough_address_is_named() -> None:
    with pods("no6") as bare:
        bare.rules(REDIRECT_RULES)
        subprocess.run(["ip", "-n", bare.pod, "addr", "del", "::6/128", "dev", "lo"], check=True)
        with proxy(bare.pod, **REDIRECT) as running:
            assert is_reset(bare.far, V6["pod"], APP_PORT)
            flow = running.flow()
    assert (flow["reason"], flow["error"]) == ("connect_failed", "source ::6: EADDRNOTAVAIL")


@NETS
def test_inbound_tproxy_reaches_the_application(tproxying: Pods, net: dict[str, str]) -> None:
    with proxy(tproxying.pod, **TPROXY) as running:
        server = listen(tproxying.pod, net["pod"], APP_PORT)
        assert converse(client(tproxying.far, net["pod"], APP_PORT), server) in ("127.0.0.6", "::6")
        flow = running.flow()
    assert (flow["original_dst"], flow["listener"].split()[1]) == (text(net["pod"], APP_PORT), "tproxy")


@NETS
def test_original_source_shows_the_client_to_the_application(tproxying: Pods, net: dict[str, str]) -> None:
    with proxy(tproxying.pod, **TPROXY, original_source=True, upstream_mark=3) as running:
        server = listen(tproxying.pod, net["pod"], APP_PORT)
        assert converse(client(tproxying.far, net["pod"], APP_PORT), server) == net["far"]
        assert running.flow()["reason"] == "closed"


@NETS
def test_a_tproxied_dial_of_our_own_port_is_refused(tproxying: Pods, net: dict[str, str]) -> None:
    with proxy(tproxying.pod, **TPROXY) as running:
        assert is_reset(tproxying.far, net["pod"], OUTBOUND)
        assert running.flow()["reason"] == "refused_direct_dial"


@NETS
def test_udp_is_relayed_and_replies_come_from_the_original_destination(tproxying: Pods, net: dict[str, str]) -> None:
    udp = [("outbound", "tproxy", OUTBOUND, family) for family in FAMILIES]
    server = listen(tproxying.far, net["far"], 9000, socket.SOCK_DGRAM)
    # The client is connected: a reply from any other source would not be delivered.
    with (
        proxy(tproxying.pod, **TPROXY, udp_listeners=udp, udp_idle_s=2.0) as running,
        server,
        client(tproxying.pod, net["far"], 9000, socket.SOCK_DGRAM) as near,
    ):
        for turn in range(3):
            near.send(b"q%d" % turn)
            question, peer = server.recvfrom(100)
            server.sendto(b"a" + question, peer)
            assert near.recv(100) == b"aq%d" % turn
        flow = running.flow()
    assert (flow["protocol"], flow["original_dst"]) == ("udp", text(net["far"], 9000))
    assert (flow["bytes_sent"], flow["bytes_received"], flow["uid"]) == (6, 9, 0)


@NETS
def test_inbound_udp_reaches_the_application_from_the_passthrough_address(tproxying: Pods, net: dict[str, str]) -> None:
    udp = [("inbound", "tproxy", INBOUND, family) for family in FAMILIES]
    with (
        proxy(tproxying.pod, **TPROXY, udp_listeners=udp) as running,
        listen(tproxying.pod, net["pod"], APP_PORT, socket.SOCK_DGRAM) as server,
        client(tproxying.far, net["pod"], APP_PORT, socket.SOCK_DGRAM) as near,
    ):
        near.send(PING)
        question, peer = server.recvfrom(100)
        assert (question, peer[0]) in ((PING, "127.0.0.6"), (PING, "::6"))
        server.sendto(PONG, peer)
        assert near.recv(100) == PONG
        assert running.stop() == 0
    assert [(flow["direction"], flow["reason"]) for flow in running.flows] == [("inbound", "drained")]


@NETS
def test_inbound_udp_reaches_a_server_on_all_addresses(tproxying: Pods, net: dict[str, str]) -> None:
    """Most servers: no SO_REUSEADDR, and the kernel chooses what they answer from."""
    udp = [("inbound", "tproxy", INBOUND, family) for family in FAMILIES]
    with (
        proxy(tproxying.pod, **TPROXY, udp_listeners=udp),
        listen(tproxying.pod, "::" if ":" in net["pod"] else "0.0.0.0", APP_PORT, socket.SOCK_DGRAM) as server,
        client(tproxying.far, net["pod"], APP_PORT, socket.SOCK_DGRAM) as near,
    ):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        for _ in range(2):
            near.send(PING)
            question, peer = server.recvfrom(100)
            server.sendto(question[::-1], peer)
            assert near.recv(100) == PING[::-1]


@NETS
def test_datagrams_in_one_batch_to_a_port_that_was_closed_end_their_flow_once(tproxying: Pods, net: dict[str, str]) -> None:
    udp = [("inbound", "tproxy", INBOUND, family) for family in FAMILIES]
    with (
        proxy(tproxying.pod, **TPROXY, udp_listeners=udp) as running,
        client(tproxying.far, net["pod"], APP_PORT, socket.SOCK_DGRAM) as near,
    ):
        with listen(tproxying.pod, net["pod"], APP_PORT, socket.SOCK_DGRAM) as server:
            near.send(PING)
            server.recvfrom(100)
        running.process.send_signal(signal.SIGSTOP)
        for _ in range(10):
            near.send(PING)
        running.process.send_signal(signal.SIGCONT)
        running.flow(lambda flow: flow["error"] == "ECONNREFUSED")
        assert running.stop() == 0


@NETS
def test_outbound_tproxy_reaches_the_original_destination(tproxying: Pods, net: dict[str, str]) -> None:
    with proxy(tproxying.pod, **TPROXY) as running:
        server = listen(tproxying.far, net["far"], 9002)
        assert converse(client(tproxying.pod, net["far"], 9002), server) == net["pod"]
        flow = running.flow()
    assert (flow["direction"], flow["original_dst"], flow["uid"]) == ("outbound", text(net["far"], 9002), 0)
