"""The 17 families of Kuma's black-box suite, each with packets: who answers, and with which original destination."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.rig.capturing import Capture
from tests.rig.client import PROXY_UID, Answer, Question, ask_all
from tests.rig.net import resolv_conf, sysctl
from tests.rig.sockets import join
from tests.rig.world import Net, World

Ask = Callable[..., Answer]
KUMA_UID = 4201
RANDOM = random.Random(17)
SOME_PORTS = sorted(RANDOM.sample(range(1024, 15000), 25))
QUERIES = 1000


def test_inbound_any_port_is_captured(w: World, net: Net, enabled: Capture) -> None:
    enabled()
    targets = [net.at("pod", port) for port in SOME_PORTS]
    assert ask_all([Question(w.far, to, uid=0) for to in targets]) == [Answer("inbound", to) for to in targets]


def test_inbound_excluded_port_answers_directly(net: Net, enabled: Capture, client: Ask) -> None:
    enabled(exclude_inbound_ports="8080")
    assert client(net.at("pod", 8080)) == Answer("app", net.at("pod", 8080))
    assert client(net.at("pod", 9000)) == Answer("inbound", net.at("pod", 9000))


def test_inbound_only_included_port_is_captured(net: Net, enabled: Capture, client: Ask) -> None:
    enabled(include_inbound_ports="8080")
    assert client(net.at("pod", 8080)) == Answer("inbound", net.at("pod", 8080))
    assert client(net.at("pod", 9000)) == Answer("app", net.at("pod", 9000))


def test_inbound_off_reaches_the_application(net: Net, enabled: Capture, client: Ask, app: Ask) -> None:
    enabled(inbound="off")
    assert client(net.at("pod")) == Answer("app", net.at("pod"))
    assert app(net.at("server")) == Answer("outbound", net.at("server"))


def test_outbound_any_address_and_port_is_captured(w: World, net: Net, enabled: Capture) -> None:
    enabled()
    prefix = net.server.rpartition(":" if net.bits == 128 else ".")[0] + (":" if net.bits == 128 else ".")
    targets = [join(f"{prefix}{RANDOM.randrange(60, 99)}", port) for port in SOME_PORTS]
    assert ask_all([Question(w.pod, to) for to in targets]) == [Answer("outbound", to) for to in targets]


def test_outbound_excluded_port_goes_direct(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(exclude_outbound_ports="8080")
    assert app(net.at("server", 8080)) == Answer("far", net.at("server", 8080))
    assert app(net.at("server", 9000)) == Answer("outbound", net.at("server", 9000))


def test_outbound_excluded_for_a_uid_and_port(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(exclude_outbound_for_uids=f"tcp:8080:{KUMA_UID}")
    excluded, other = net.at("server", 8080), net.at("server", 9000)
    assert app(excluded, uid=KUMA_UID) == Answer("far", excluded)
    assert app(other, uid=KUMA_UID) == Answer("outbound", other)
    assert app(excluded) == Answer("outbound", excluded)


def test_outbound_only_included_port_is_captured(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(include_outbound_ports="8080")
    assert app(net.at("server", 8080)) == Answer("outbound", net.at("server", 8080))
    assert app(net.at("server", 9000)) == Answer("far", net.at("server", 9000))


def test_outbound_off_goes_direct(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(outbound="off")
    assert app(net.at("server")) == Answer("far", net.at("server"))
    assert client(net.at("pod")) == Answer("inbound", net.at("pod"))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_dns_to_any_server_is_captured(proto: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(dns="all")
    for who in ("resolver", "stray_resolver", "far", "loopback"):
        assert app(net.at(who, 53), proto=proto).by == "dns", who


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_dns_of_an_excluded_uid_is_not_captured(proto: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(dns="all", exclude_outbound_for_uids=f"{proto}:53:{KUMA_UID}")
    resolver = net.at("resolver", 53)
    assert app(resolver, proto=proto, uid=KUMA_UID) == Answer("far", resolver)
    assert app(resolver, proto=proto).by == "dns"


def test_dns_over_tcp_keeps_its_original_destination(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(dns="all")
    assert app(net.at("resolver", 53)) == Answer("dns", net.at("resolver", 53))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_dns_only_to_servers_of_resolv_conf(proto: str, w: World, net: Net, enabled: Capture, app: Ask) -> None:
    with resolv_conf(w.pod, net.resolver):
        enabled(dns="resolv-conf", outbound="off")
        assert app(net.at("resolver", 53), proto=proto).by == "dns"
        assert app(net.at("stray_resolver", 53), proto=proto) == Answer("far", net.at("stray_resolver", 53))
        assert app(net.at("loopback", 53), proto=proto) == Answer("app", net.at("loopback", 53))


def test_dns_without_a_server_in_resolv_conf_is_left_alone(w: World, net: Net, enabled: Capture, app: Ask) -> None:
    with resolv_conf(w.pod):
        enabled(dns="resolv-conf")
        assert app(net.at("resolver", 53), proto="udp") == Answer("far", net.at("resolver", 53))
        assert app(net.at("resolver", 53)) == Answer("outbound", net.at("resolver", 53))


def test_outbound_from_a_virtual_interface_is_captured(w: World, net: Net, enabled: Capture, client: Ask) -> None:
    enabled(virtual_interfaces="virt0", exclude_outbound_ports="8080")
    ask = lambda to, **how: ask_all([Question(w.guest, to, **how)])[0]  # noqa: E731
    assert ask(net.at("server")) == Answer("outbound", net.at("server"))
    assert ask(net.at("server", 8080)) == Answer("far", net.at("server", 8080))
    assert client(net.at("pod")) == Answer("inbound", net.at("pod"))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_dns_from_a_virtual_interface_is_captured(proto: str, w: World, net: Net, enabled: Capture) -> None:
    enabled(virtual_interfaces="virt0", dns="all")
    (answer,) = ask_all([Question(w.guest, net.at("resolver", 53), proto=proto)])
    assert answer.by == "dns"


def test_dns_zone_split_under_source_port_pressure(w: World, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(dns="all")
    resolver = net.at("resolver", 53)
    before = w.servers.seen.copy()
    with sysctl(w.pod, "ipv4/ip_local_port_range", "20001 20003"):
        for _ in range(QUERIES):
            assert app(resolver, proto="udp").by == "dns"
            assert app(resolver, proto="udp", uid=PROXY_UID) == Answer("far", resolver)
    assert w.servers.seen - before == {"dns": QUERIES, "far": QUERIES}


def test_dns_zone_split_with_resolv_conf_servers(w: World, net: Net, enabled: Capture, app: Ask) -> None:
    with resolv_conf(w.pod, net.resolver), sysctl(w.pod, "ipv4/ip_local_port_range", "20001 20003"):
        enabled(dns="resolv-conf")
        before = w.servers.seen.copy()
        for _ in range(QUERIES // 10):
            assert app(net.at("resolver", 53), proto="udp").by == "dns"
            assert app(net.at("resolver", 53), proto="udp", uid=PROXY_UID) == Answer("far", net.at("resolver", 53))
            assert app(net.at("stray_resolver", 53), proto="udp") == Answer("far", net.at("stray_resolver", 53))
    assert w.servers.seen - before == {"dns": QUERIES // 10, "far": 2 * QUERIES // 10}
