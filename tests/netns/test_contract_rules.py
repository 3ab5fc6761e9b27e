"""What options say about which traffic is captured: exclusions, inclusions, owners, interfaces, families."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.rig.capturing import Capture
from tests.rig.client import LOST, LOST_S, PROXY_UID, Answer, Question, ask, ask_all
from tests.rig.world import PORTS, Net, World

Ask = Callable[..., Answer]
MANY_RANGES = ",".join([*(f"{first}-{first + 1}" for first in range(3000, 3120, 4)), "6000-6050", "443"])
FAMILIES = {"v4": "v6", "v6": "v4"}


def test_many_excluded_outbound_ranges(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(exclude_outbound_ports=MANY_RANGES)
    for port in (443, 6000, 6050):
        assert app(net.at("server", port)) == Answer("far", net.at("server", port))
    for port in (80, 3002, 3003, 8080):
        assert app(net.at("server", port)) == Answer("outbound", net.at("server", port))


def test_many_excluded_inbound_ranges(net: Net, enabled: Capture, client: Ask) -> None:
    enabled(exclude_inbound_ports=MANY_RANGES)
    for port in (443, 6000, 6050):
        assert client(net.at("pod", port)) == Answer("app", net.at("pod", port))
    for port in (80, 3002, 3003, 8080):
        assert client(net.at("pod", port)) == Answer("inbound", net.at("pod", port))


def test_many_included_ranges(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(include_outbound_ports=MANY_RANGES, include_inbound_ports=MANY_RANGES)
    for port in (443, 3000, 6050):
        assert app(net.at("server", port)) == Answer("outbound", net.at("server", port))
        assert client(net.at("pod", port)) == Answer("inbound", net.at("pod", port))
    assert app(net.at("server", 80)) == Answer("far", net.at("server", 80))
    assert client(net.at("pod", 80)) == Answer("app", net.at("pod", 80))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_uid_rule_names_protocol_ports_and_uids(proto: str, net: Net, enabled: Capture, app: Ask) -> None:
    enabled(udp="tproxy", exclude_outbound_for_uids=f"{proto}:80,6000-6050:2000-2010;*:443:70000")
    other = {"tcp": "udp", "udp": "tcp"}[proto]
    for port in (80, 6000, 6050):
        to = net.at("server", port)
        assert app(to, proto=proto, uid=2005) == Answer("far", to)
        assert app(to, proto=other, uid=2005) == Answer("outbound", to)
        assert app(to, proto=proto, uid=2011) == Answer("outbound", to)
    assert app(net.at("server", 8080), proto=proto, uid=2005) == Answer("outbound", net.at("server", 8080))
    assert app(net.at("server", 443), proto=proto, uid=70000) == Answer("far", net.at("server", 443))
    assert app(net.at("server", 443), proto=proto, uid=4464) == Answer("outbound", net.at("server", 443))


def test_excluded_port_beats_included_port(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(
        include_outbound_ports="80,8080",
        exclude_outbound_ports="8080",
        include_inbound_ports="80,8080",
        exclude_inbound_ports="8080",
    )
    assert app(net.at("server", 8080)) == Answer("far", net.at("server", 8080))
    assert app(net.at("server", 80)) == Answer("outbound", net.at("server", 80))
    assert client(net.at("pod", 8080)) == Answer("app", net.at("pod", 8080))
    assert client(net.at("pod", 80)) == Answer("inbound", net.at("pod", 80))


def test_excluded_cidr_beats_included_cidr(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(include_outbound_cidrs="10.0.2.0/24,fd00:2::/64", exclude_outbound_cidrs="10.0.2.3,fd00:2::3")
    assert app(net.at("server")) == Answer("outbound", net.at("server"))
    assert app(net.at("other")) == Answer("far", net.at("other"))
    assert app(net.at("far")) == Answer("far", net.at("far"))


def test_excluded_uid_beats_included_port_cidr_and_uid(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(
        include_uids="1000-2000",
        exclude_uids="1500",
        include_outbound_ports="80",
        include_outbound_cidrs="10.0.2.0/24,fd00:2::/64",
    )
    assert app(net.at("server"), uid=1500) == Answer("far", net.at("server"))
    assert app(net.at("server"), uid=1499) == Answer("outbound", net.at("server"))


def test_excluded_gid_beats_included_uid_and_gid(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(include_uids="1000", include_gids="2000-3000", exclude_gids="2500")
    assert app(net.at("server"), uid=1000, gid=2500) == Answer("far", net.at("server"))
    assert app(net.at("server"), uid=1000, gid=2501) == Answer("outbound", net.at("server"))


def test_excluded_client_beats_included_inbound_port(net: Net, enabled: Capture, client: Ask) -> None:
    enabled(include_inbound_ports="80", exclude_inbound_cidrs="10.0.2.0/24,fd00:2::/64")
    assert client(net.at("pod"), source=net.at("other", 0)) == Answer("app", net.at("pod"))
    assert client(net.at("pod"), source=net.at("far", 0)) == Answer("inbound", net.at("pod"))


def test_include_lists_together_mean_and(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(
        include_outbound_ports="80,443,6000-6050",
        include_outbound_cidrs="10.0.2.2,10.0.3.0/24,fd00:2::2,fd00:3::/64",
        include_uids="1000,2000",
        include_gids="1000,3000-3010",
    )
    assert app(net.at("server"), uid=2000, gid=3005) == Answer("outbound", net.at("server"))
    for to, uid, gid in (
        (net.at("server", 8080), 2000, 3005),
        (net.at("other"), 2000, 3005),
        (net.at("server"), 2001, 3005),
        (net.at("server"), 2000, 3011),
    ):
        assert app(to, uid=uid, gid=gid) == Answer("far", to)


@pytest.mark.parametrize(
    "texts", [{}, {"inbound": "tproxy", "outbound": "tproxy", "udp": "tproxy"}], ids=["redirect", "tproxy"]
)
def test_excluded_interface_is_left_alone_both_ways(
    texts: dict[str, str], net: Net, enabled: Capture, app: Ask, client: Ask
) -> None:
    enabled(**texts, exclude_interfaces="eth1", include_inbound_ports="80")
    assert app(net.at("far_eth1")) == Answer("far", net.at("far_eth1"))
    assert client(net.at("pod_eth1")) == Answer("app", net.at("pod_eth1"))
    assert app(net.at("far")) == Answer("outbound", net.at("far"))
    assert client(net.at("pod")) == Answer("inbound", net.at("pod"))


def test_nothing_else_of_a_virtual_interface_is_captured(w: World, net: Net, enabled: Capture) -> None:
    enabled(virtual_interfaces="virt0", exclude_outbound_cidrs="10.0.2.3,fd00:2::3", include_outbound_ports="80,8080")
    assert ask(w.guest, net.at("server")) == Answer("outbound", net.at("server"))
    assert ask(w.guest, net.at("other")) == Answer("far", net.at("other"))
    assert ask(w.guest, net.at("server", 443)) == Answer("far", net.at("server", 443))


def test_the_far_side_reaches_the_guest(w: World, net: Net, enabled: Capture, client: Ask) -> None:
    # Forwarded traffic that comes in from outside is inbound, as with every mesh: PREROUTING does not know it goes on.
    enabled(virtual_interfaces="virt0", inbound="off")
    assert client(net.at("guest", 81)).by == "refused"
    assert ask(w.guest, net.at("far")) == Answer("outbound", net.at("far"))


@pytest.mark.parametrize("uncovered", ["block", "bypass"])
def test_the_uncovered_family(uncovered: str, w: World, net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(ip_family=FAMILIES[net.family], uncovered_family=uncovered)
    direct = {"block": (LOST, LOST), "bypass": (Answer("far", net.at("server")), Answer("app", net.at("pod")))}
    outbound, inbound = direct[uncovered]
    questions = [Question(w.pod, net.at("server")), Question(w.far, net.at("pod"), uid=0)]
    assert ask_all(questions, timeout_s=LOST_S) == [outbound, inbound]
    assert app(net.at("loopback")) == Answer("app", net.at("loopback"))
    assert app(net.at("pod")) == Answer("app", net.at("pod"))
    assert app(net.at("server"), uid=PROXY_UID) == Answer("far", net.at("server"))


def test_the_covered_family_is_captured_beside_a_blocked_one(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(ip_family=net.family, uncovered_family="block")
    assert app(net.at("server")) == Answer("outbound", net.at("server"))
    assert client(net.at("pod")) == Answer("inbound", net.at("pod"))


def test_a_blocked_family_keeps_its_exclusions(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(ip_family=FAMILIES[net.family], exclude_outbound_ports="8080", exclude_inbound_ports="8080", exclude_uids="2000")
    assert app(net.at("server", 8080)) == Answer("far", net.at("server", 8080))
    assert client(net.at("pod", 8080)) == Answer("app", net.at("pod", 8080))
    assert app(net.at("server"), uid=2000) == Answer("far", net.at("server"))


def test_a_blocked_family_blocks_dns_too(net: Net, enabled: Capture, app: Ask) -> None:
    enabled(ip_family=FAMILIES[net.family], dns="all", outbound="off", inbound="off")
    for proto in ("tcp", "udp"):
        assert app(net.at("resolver", 53), proto=proto, timeout_s=LOST_S) == LOST, proto
    assert app(net.at("server")) == Answer("far", net.at("server"))


def test_log_rules_load_and_do_not_hinder(net: Net, enabled: Capture, app: Ask, client: Ask) -> None:
    enabled(log_rules="true", dns="all", udp="tproxy", drop_invalid="true")
    assert app(net.at("server")) == Answer("outbound", net.at("server"))
    assert client(net.at("pod")) == Answer("inbound", net.at("pod"))
    assert app(net.at("resolver", 53), proto="udp").by == "dns"


def test_every_port_of_the_application_stays_reachable_with_everything_off(w: World, net: Net, enabled: Capture) -> None:
    enabled(inbound="off", outbound="off")
    targets = [net.at("pod", port) for port in PORTS]
    assert ask_all([Question(w.far, to, uid=0) for to in targets]) == [Answer("app", to) for to in targets]
