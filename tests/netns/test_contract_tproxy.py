"""TPROXY in and out, TCP and UDP: addresses and ports are kept, and UDP is answered from the address that was asked.

And the proxy that dials the application from the client's own address (--original-source), by REDIRECT as well.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.rig.capturing import Capture
from tests.rig.client import ANSWER_S, LOST_S, PROXY_UID, Answer, Question, ask, ask_all, connected
from tests.rig.sockets import open_socket, split
from tests.rig.world import Net, World

Ask = Callable[..., Answer]
FULL = {"inbound": "tproxy", "outbound": "tproxy", "udp": "tproxy"}
# A port a test: the one before may still be in TIME_WAIT.
PORTS = itertools.count(31000)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_inbound_keeps_the_clients_address_and_port(proto: str, net: Net, enabled: Capture, client: Ask) -> None:
    enabled(**FULL)
    source = net.at("other", next(PORTS))
    answer = client(net.at("pod", 8080), proto=proto, source=source)
    assert (answer, answer.peer) == (Answer("inbound", net.at("pod", 8080)), source)
    assert answer.local == net.at("pod", 8080)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_outbound_keeps_the_applications_address_and_port(proto: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(**FULL)
    source = net.at("pod", next(PORTS))
    answer = app(net.at("server", 8080), proto=proto, source=source)
    assert (answer, answer.peer) == (Answer("outbound", net.at("server", 8080)), source)
    assert answer.local == net.at("server", 8080)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_virtual_interfaces_address_and_port_are_kept(proto: str, w: World, net: Net, enabled: Capture) -> None:
    enabled(**FULL, virtual_interfaces="virt0")
    source = net.at("guest", next(PORTS))
    answer = ask(w.guest, net.at("server", 8080), proto=proto, source=source)
    assert (answer, answer.peer) == (Answer("outbound", net.at("server", 8080)), source)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_one_source_port_serves_two_destinations(proto: str, w: World, net: Net, enabled: Capture) -> None:
    # REDIRECT has to change the second connection's source port here.
    enabled(**FULL)
    source = net.at("pod", next(PORTS))
    questions = [Question(w.pod, net.at(who), proto, source=source) for who in ("server", "other")]
    answers = ask_all(questions)
    assert answers == [Answer("outbound", net.at("server")), Answer("outbound", net.at("other"))]
    assert [answer.peer for answer in answers] == [source] * 2


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_replies_to_the_proxys_own_connections_come_home(proto: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(**FULL)
    assert app(net.at("server"), proto=proto, uid=PROXY_UID) == Answer("far", net.at("server"))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_replies_to_excluded_traffic_come_home(proto: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(**FULL, exclude_outbound_ports="8080")
    assert app(net.at("server", 8080), proto=proto) == Answer("far", net.at("server", 8080))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_loopback_and_own_address_stay_direct(proto: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(**FULL)
    for who in ("loopback", "pod"):
        assert app(net.at(who), proto=proto) == Answer("app", net.at(who)), who


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_exclusions_hold(proto: str, net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(**FULL, exclude_outbound_cidrs=f"{net.other},{net.far}", exclude_inbound_ports="9000", exclude_uids="2000")
    assert app(net.at("other"), proto=proto) == Answer("far", net.at("other"))
    assert app(net.at("server"), proto=proto, uid=2000) == Answer("far", net.at("server"))
    assert client(net.at("pod", 9000), proto=proto) == Answer("app", net.at("pod", 9000))
    assert app(net.at("server"), proto=proto) == Answer("outbound", net.at("server"))


def test_udp_alone_leaves_tcp_to_redirect(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(udp="tproxy")
    for proto in ("tcp", "udp"):
        assert app(net.at("server"), proto=proto) == Answer("outbound", net.at("server")), proto
        assert client(net.at("pod"), proto=proto) == Answer("inbound", net.at("pod")), proto


def test_udp_off_leaves_udp_alone(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled()
    assert app(net.at("server"), proto="udp") == Answer("far", net.at("server"))
    assert client(net.at("pod"), proto="udp") == Answer("app", net.at("pod"))


@pytest.mark.parametrize("outbound", ["redirect", "tproxy"])
def test_dns_goes_to_its_own_port_beside_udp(outbound: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(udp="tproxy", outbound=outbound, dns="all")
    for proto in ("tcp", "udp"):
        assert app(net.at("resolver", 53), proto=proto).by == "dns", proto
        assert app(net.at("resolver", 53), proto=proto, uid=PROXY_UID) == Answer("far", net.at("resolver", 53))
        assert app(net.at("server"), proto=proto) == Answer("outbound", net.at("server"))


def test_nobody_listening_for_tproxy_is_no_way_around(w: World, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(**FULL, outbound_port="15901", inbound_port="15906")
    before = w.servers.seen.copy()
    questions = [Question(w.pod, net.at("server"), proto) for proto in ("tcp", "udp")]
    questions += [Question(w.far, net.at("pod"), proto, uid=0) for proto in ("tcp", "udp")]
    ask_all(questions, timeout_s=LOST_S)
    assert w.servers.seen == before


def test_a_tproxied_connection_carries_traffic_both_ways(w: World, net: Net, enabled: Capture) -> None:
    enabled(**FULL)
    for pod, to, uid in ((w.pod, net.at("server"), 1000), (w.far, net.at("pod"), 0)):
        with connected(Question(pod, to, uid=uid)) as (sock, _):
            for _ in range(3):
                sock.sendall(b"x" * 20_000)
                received = 0
                while received < 20_000:
                    received += len(sock.recv(65536))
                assert received == 20_000


@contextmanager
def proxy_dials(w: World, to: str, source: str) -> Iterator[socket.socket]:
    """The proxy's connection to the application, from the address of a client on the far side."""
    with open_socket(w.pod, socket.SOCK_STREAM, to, uid=PROXY_UID, gid=PROXY_UID, source=source, transparent=True) as sock:
        sock.settimeout(ANSWER_S)
        sock.connect(split(to))
        yield sock


@pytest.mark.parametrize("mechanism", ["redirect", "tproxy"])
def test_the_application_sees_the_client(mechanism: str, w: World, net: Net, enabled: Capture) -> None:
    enabled(inbound=mechanism, original_source="true")
    source = net.at("other", next(PORTS))
    with proxy_dials(w, net.at("pod", 8080), source) as sock:
        said = sock.recv(2048).decode()
        assert '"server": "app"' in said
        assert f'"peer": "{source}"' in said
        sock.sendall(b"hello")
        assert sock.recv(16) == b"hello"


@pytest.mark.parametrize("mechanism", ["redirect", "tproxy"])
def test_original_source_leaves_the_rest_as_it_was(mechanism: str, net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(inbound=mechanism, original_source="true")
    assert client(net.at("pod")) == Answer("inbound", net.at("pod"))
    assert app(net.at("server")) == Answer("outbound", net.at("server"))
    assert app(net.at("server"), uid=PROXY_UID) == Answer("far", net.at("server"))
    assert app(net.at("pod"), uid=PROXY_UID) == Answer("inbound", net.at("pod"))
    assert app(net.at("pod")) == Answer("app", net.at("pod"))


@pytest.mark.parametrize("mechanism", ["redirect", "tproxy"])
def test_original_source_while_the_clients_own_connection_is_open(mechanism: str, w: World, net: Net, enabled: Capture) -> None:
    # One client address and port in two connections: client to proxy, and proxy to application.
    enabled(inbound=mechanism, original_source="true")
    source = net.at("other", next(PORTS))
    with connected(Question(w.far, net.at("pod", 8080), uid=0, source=source)) as (outer, answer):
        assert answer == Answer("inbound", net.at("pod", 8080))
        with proxy_dials(w, net.at("pod", 9000), source) as inner:
            assert '"server": "app"' in inner.recv(2048).decode()
            for sock in (outer, inner):
                sock.sendall(b"ping")
                assert sock.recv(16) == b"ping"
