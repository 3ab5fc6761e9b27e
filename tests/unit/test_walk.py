"""The decision table of docs/rules.md, packet by packet."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

import pytest

from interceptor.config import FIELD, Config, Names
from interceptor.errors import Unsupported
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts, Match
from interceptor.plan.walk import Outcome, Packet, matches, walk
from interceptor.values import Family, IdRange, Proto

NAMES = Names(uid={}.__getitem__, gid={}.__getitem__)
OWN, FAR, LO = (ipaddress.ip_address(text) for text in ("10.1.0.2", "192.0.2.9", "127.0.0.1"))
RESOLVER = ipaddress.ip_address("10.96.0.10")
LOCAL = frozenset({OWN, LO})
APP = Packet(Proto.TCP, OWN, FAR, 443, uid=1000, gid=1000, out_interface="eth0", local=LOCAL)
PROXY = replace(APP, uid=1337, gid=1337)
CLIENT = Packet(Proto.TCP, FAR, OWN, 8080, in_interface="eth0", local=LOCAL)
TO_SELF: dict[str, Any] = {"src": OWN, "dst": OWN, "out_interface": "lo"}
HOST = HostFacts(resolvers=(ipaddress.ip_network("10.96.0.10"),))


def walked(packet: Packet, **texts: str) -> Outcome:
    config = Config(**{name: FIELD[name].kind.parse(text, NAMES) for name, text in texts.items()})
    return walk(build_plan(config, HOST), packet)


CASES = [
    pytest.param(APP, {}, 15001, id="application to anywhere"),
    pytest.param(replace(APP, dst=LO, src=LO, out_interface="lo"), {}, None, id="application to loopback"),
    pytest.param(replace(APP, **TO_SELF), {}, None, id="application to its own pod"),
    pytest.param(PROXY, {}, None, id="proxy to anywhere"),
    pytest.param(replace(PROXY, gid=5), {}, None, id="proxy by its uid alone"),
    pytest.param(replace(PROXY, uid=5), {}, None, id="proxy by its gid alone"),
    pytest.param(replace(APP, mark=0x10000), {"proxy_mark": "0x10000/0x10000"}, None, id="proxy by its mark"),
    pytest.param(replace(APP, cgroup="a/b"), {"proxy_cgroup": "a/b"}, None, id="proxy by its cgroup"),
    pytest.param(replace(PROXY, **TO_SELF), {}, 15006, id="self-call of the proxy"),
    pytest.param(replace(PROXY, **TO_SELF), {"inbound": "tproxy"}, 15006, id="self-call of the proxy with tproxy"),
    pytest.param(
        replace(PROXY, src=ipaddress.ip_address("127.0.0.6"), dst=OWN, out_interface="lo"), {}, None, id="inbound leg"
    ),
    pytest.param(
        replace(PROXY, src=FAR, dst=OWN, out_interface="lo"),
        {"original_source": "true"},
        None,
        id="inbound leg from the client",
    ),
    pytest.param(CLIENT, {}, 15006, id="client to any port"),
    pytest.param(CLIENT, {"inbound": "tproxy"}, 15006, id="client to any port with tproxy"),
    pytest.param(replace(CLIENT, dport=15008), {}, None, id="client to the tunnel port"),
    pytest.param(replace(CLIENT, dport=15002), {}, None, id="client to the probe port"),
    pytest.param(CLIENT, {"exclude_inbound_cidrs": "192.0.2.0/24"}, None, id="client that is excluded"),
    pytest.param(CLIENT, {"include_inbound_ports": "80"}, None, id="client to a port that is not included"),
    pytest.param(replace(APP, proto=Proto.UDP), {}, None, id="udp by default"),
    pytest.param(replace(APP, proto=Proto.UDP), {"udp": "tproxy"}, 15001, id="udp with tproxy"),
    pytest.param(replace(APP, proto=Proto.UDP, dst=RESOLVER, dport=53), {"dns": "resolv-conf"}, 15053, id="dns over udp"),
    pytest.param(replace(APP, dst=RESOLVER, dport=53), {"dns": "resolv-conf"}, 15053, id="dns over tcp"),
    pytest.param(
        replace(APP, proto=Proto.UDP, dport=53), {"dns": "resolv-conf"}, None, id="dns to a server not in resolv.conf"
    ),
    pytest.param(replace(APP, proto=Proto.UDP, dport=53), {"dns": "all"}, 15053, id="dns to any server"),
    pytest.param(replace(PROXY, proto=Proto.UDP, dport=53), {"dns": "all", "udp": "tproxy"}, None, id="dns of the proxy"),
    pytest.param(APP, {"include_outbound_ports": "80"}, None, id="port that is not included"),
    pytest.param(
        APP, {"include_outbound_ports": "443", "include_outbound_cidrs": "10.0.0.0/8"}, None, id="include lists mean and"
    ),
    pytest.param(APP, {"exclude_outbound_for_uids": "tcp:443:1000"}, None, id="port excluded for this uid"),
    pytest.param(APP, {"exclude_outbound_for_uids": "tcp:443:1001"}, 15001, id="port excluded for another uid"),
    pytest.param(APP, {"exclude_interfaces": "eth0"}, None, id="excluded interface"),
    pytest.param(
        replace(CLIENT, in_interface="docker0", dst=FAR), {"virtual_interfaces": "docker0"}, 15001, id="virtual interface"
    ),
    pytest.param(
        replace(CLIENT, in_interface="docker0", dst=FAR),
        {"virtual_interfaces": "docker0", "inbound": "tproxy"},
        15001,
        id="virtual interface with tproxy inbound",
    ),
    pytest.param(
        replace(CLIENT, in_interface="docker0"),
        {"virtual_interfaces": "docker0", "outbound": "tproxy", "exclude_outbound_ports": "8080"},
        None,
        id="excluded port from a virtual interface is not inbound either",
    ),
]


@pytest.mark.parametrize(("packet", "options", "port"), CASES)
def test_packet_goes_to(packet: Packet, options: dict[str, str], port: int | None) -> None:
    outcome = walked(packet, **options)

    assert (outcome.fate, outcome.port) == ("captured" if port else "direct", port)


def test_outbound_tproxy_captures_by_its_mechanism() -> None:
    assert walked(APP, outbound="tproxy").mechanism == "tproxy"


@pytest.mark.parametrize(("uid", "gid", "expected"), [(1, 9, True), (9, 2, True), (9, 9, False), (None, None, False)])
def test_users_and_groups_of_one_match_are_alternatives(uid: int | None, gid: int | None, expected: bool) -> None:
    match = Match(uids=(IdRange(1, 1),), gids=(IdRange(2, 2),))

    assert matches(match, replace(APP, uid=uid, gid=gid)) == expected


def test_loopback_of_a_blocked_family_stays_direct() -> None:
    v6 = ipaddress.ip_address("::1")
    packet = replace(APP, src=v6, dst=v6, out_interface="lo", local=frozenset({v6}))

    assert walked(packet, ip_family="v4").fate == "direct"


@pytest.mark.parametrize(("policy", "fate"), [("block", "dropped"), ("bypass", "direct")])
def test_uncovered_family_is_treated_as_told(policy: str, fate: str) -> None:
    packet = replace(APP, src=ipaddress.ip_address("fd00::2"), dst=ipaddress.ip_address("2001:db8::1"))

    assert walked(packet, ip_family="v4", uncovered_family=policy).fate == fate


def test_deciding_rule_names_the_option_behind_it() -> None:
    outcome = walked(APP, exclude_outbound_ports="443")

    assert outcome.deciding is not None
    assert (outcome.deciding.rule.option, outcome.deciding.rule.why) == ("--exclude-outbound-ports", "this port is excluded")


def test_captured_packets_deciding_rule_is_the_one_that_sent_it() -> None:
    outcome = walked(APP, include_outbound_ports="443")

    assert outcome.deciding is not None
    assert outcome.deciding.rule.option == "--include-outbound-ports"


def test_kernel_without_a_family_that_is_asked_for_is_refused() -> None:
    with pytest.raises(Unsupported, match="--ip-family dual: this kernel has no IPv6"):
        build_plan(Config(ip_family="dual"), HostFacts(kernel_families=(Family.V4,)))


BYPASS = {"before_proxy": "bypass", "dns": "all", "udp": "tproxy"}
ANNOUNCEMENT = replace(PROXY, proto=Proto.UDP, src=LO, dst=LO, dport=15002, out_interface="lo")


@pytest.mark.parametrize("packet", [APP, replace(APP, proto=Proto.UDP), replace(APP, proto=Proto.UDP, dport=53)])
def test_before_the_proxy_is_ready_an_application_goes_direct_and_the_rule_says_why(packet: Packet) -> None:
    outcome = walked(replace(packet, announced=False), **BYPASS)

    assert outcome.fate == "direct"
    assert outcome.deciding is not None
    assert outcome.deciding.rule.option == "--before-proxy bypass"
    assert walked(packet, **BYPASS).fate == "captured"


def test_the_proxys_announcement_is_taken_by_a_rule() -> None:
    outcome = walked(replace(ANNOUNCEMENT, announced=False), **BYPASS)

    assert outcome.fate == "dropped"
    assert outcome.deciding is not None
    assert outcome.deciding.rule.why == "the proxy is ready"


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(replace(ANNOUNCEMENT, uid=1000, gid=1000), id="of another user"),
        pytest.param(replace(ANNOUNCEMENT, dst=FAR, out_interface="eth0"), id="to elsewhere"),
        pytest.param(replace(ANNOUNCEMENT, dport=15003), id="to another port"),
        pytest.param(replace(ANNOUNCEMENT, proto=Proto.TCP), id="by TCP"),
    ],
)
def test_what_is_no_announcement_is_not_taken_for_one(packet: Packet) -> None:
    assert walked(replace(packet, announced=False), **BYPASS).fate == "direct"
