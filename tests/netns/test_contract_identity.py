"""Who the proxy is, Istio's self-call matrix, and that nothing loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.rig.capturing import Capture
from tests.rig.client import PROXY_UID, Answer
from tests.rig.world import INBOUND, OUTBOUND, Net

Ask = Callable[..., Answer]
MECHANISMS = [
    pytest.param({}, id="redirect"),
    pytest.param({"inbound": "tproxy"}, id="tproxy-in"),
    pytest.param({"inbound": "tproxy", "outbound": "tproxy"}, id="tproxy"),
    pytest.param({"outbound": "tproxy", "dns": "all"}, id="tproxy-out-with-dns"),
]


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(request.param)


def test_app_to_loopback_is_direct(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism)
    assert app(net.at("loopback")) == Answer("app", net.at("loopback"))


def test_app_to_its_own_pod_address_is_direct(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism)
    assert app(net.at("pod")) == Answer("app", net.at("pod"))


def test_app_to_a_service_that_is_itself(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism)
    service, pod = net.at("server", 8080), net.at("pod", 8080)
    assert app(service) == Answer("outbound", service)
    assert app(pod, uid=PROXY_UID) == Answer("inbound", pod)
    assert app(pod, uid=PROXY_UID, source=net.at("inbound_source", 0)) == Answer("app", pod)


def test_proxy_to_loopback_is_direct(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism)
    assert app(net.at("loopback"), uid=PROXY_UID) == Answer("app", net.at("loopback"))


def test_proxy_inbound_leg_is_direct(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism)
    for who in ("pod", "loopback"):
        answer = app(net.at(who), uid=PROXY_UID, source=net.at("inbound_source", 0))
        assert answer == Answer("app", net.at(who)), who


def test_proxy_to_its_own_pod_address_is_inbound(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism)
    assert app(net.at("pod"), uid=PROXY_UID) == Answer("inbound", net.at("pod"))


def test_proxy_self_call_respects_inbound_exclusions(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism, exclude_inbound_ports="8080")
    assert app(net.at("pod", 8080), uid=PROXY_UID) == Answer("app", net.at("pod", 8080))


def test_proxy_upstream_is_direct(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism)
    assert app(net.at("server"), uid=PROXY_UID) == Answer("far", net.at("server"))


def test_proxy_self_call_with_outbound_off(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**{**mechanism, "outbound": "off"})
    assert app(net.at("pod"), uid=PROXY_UID) == Answer("inbound", net.at("pod"))
    assert app(net.at("pod")) == Answer("app", net.at("pod"))


def test_two_proxy_uids_behave_alike(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism, proxy_uid="3,4", proxy_gid="")
    for uid in (3, 4):
        assert app(net.at("server"), uid=uid) == Answer("far", net.at("server")), uid
        assert app(net.at("pod"), uid=uid) == Answer("inbound", net.at("pod")), uid
        assert app(net.at("loopback"), uid=uid) == Answer("app", net.at("loopback")), uid
    assert app(net.at("server"), uid=5) == Answer("outbound", net.at("server"))


def test_proxy_by_gid(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism, proxy_uid="", proxy_gid="77")
    assert app(net.at("server"), uid=1000, gid=77) == Answer("far", net.at("server"))
    assert app(net.at("pod"), uid=1000, gid=77) == Answer("inbound", net.at("pod"))
    assert app(net.at("server"), uid=77, gid=1000) == Answer("outbound", net.at("server"))


def test_proxy_by_mark(net: Net, enabled: Capture, app: Ask, mechanism: dict[str, str]) -> None:
    enabled(**mechanism, proxy_uid="", proxy_gid="", proxy_mark="0x10000/0x10000")
    assert app(net.at("server"), mark=0x10000) == Answer("far", net.at("server"))
    assert app(net.at("server"), mark=0x30000) == Answer("far", net.at("server"))
    assert app(net.at("pod"), mark=0x10000) == Answer("inbound", net.at("pod"))
    assert app(net.at("server"), mark=0x20000) == Answer("outbound", net.at("server"))
    assert app(net.at("server"), uid=PROXY_UID) == Answer("outbound", net.at("server"))


def test_proxy_ids_above_65535(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(proxy_uid="4000000000", proxy_gid="", exclude_uids="70000-70010")
    assert app(net.at("server"), uid=4_000_000_000) == Answer("far", net.at("server"))
    assert app(net.at("server"), uid=70_005) == Answer("far", net.at("server"))
    for uid in (4_000_000_000 & 0xFFFF, 70_005 & 0xFFFF, 70_011):
        assert app(net.at("server"), uid=uid) == Answer("outbound", net.at("server")), uid


def test_direct_dial_of_the_proxy_is_recognisable(net: Net, enabled: Capture, app: Ask) -> None:
    # The proxy refuses a connection whose original destination is its own listener: that is what ends a loop.
    enabled()
    assert app(net.at("pod", OUTBOUND)) == Answer("outbound", net.at("pod", OUTBOUND))
    assert app(net.at("loopback", INBOUND)) == Answer("inbound", net.at("loopback", INBOUND))
    inbound_leg = app(net.at("pod", INBOUND), uid=PROXY_UID, source=net.at("inbound_source", 0))
    assert inbound_leg == Answer("inbound", net.at("pod", INBOUND))


def test_dialling_a_remote_proxy_port_does_not_loop(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled()
    for port in (OUTBOUND, INBOUND):
        assert app(net.at("server", port)) == Answer("outbound", net.at("server", port))
        assert app(net.at("server", port), uid=PROXY_UID) == Answer("far", net.at("server", port))
        assert client(net.at("pod", port)) == Answer("inbound", net.at("pod", port))


def test_tunnel_port_is_never_captured_inbound(
    net: Net, enabled: Capture, app: Ask, client: Ask, mechanism: dict[str, str]
) -> None:
    enabled(**mechanism)
    assert client(net.at("pod", 15008)) == Answer("app", net.at("pod", 15008))
    assert app(net.at("pod", 15008), uid=PROXY_UID) == Answer("app", net.at("pod", 15008))
