"""walk() and the kernel say the same of sampled packets under sampled configurations, on every backend.

The kernel's word is who answers: the proxy's port, the application, the far side, or nobody.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from interceptor import capture
from interceptor.config import Config
from interceptor.errors import ConfigError
from interceptor.plan.model import Announce, Plan
from interceptor.plan.walk import Outcome, Packet, walk
from interceptor.values import Proto
from tests.rig.capturing import options
from tests.rig.client import LOST_S, Question, ask_all
from tests.rig.kernel import forget_connections
from tests.rig.net import resolv_conf
from tests.rig.sockets import split
from tests.rig.world import DNS, INBOUND, NETS, OUTBOUND, PORTS, Net, World

PAIRS_PER_CONFIG = 40
# A configuration takes nft 0.05 s, iptables 0.3 s, python-iptables 2 s.
SHORT = {"nft": 20, "iptables-nft": 8, "iptables-legacy": 8, "libiptc": 5}
LONG = {"nft": 150, "iptables-nft": 60, "iptables-legacy": 60, "libiptc": 50}
LISTENERS = {OUTBOUND: "outbound", INBOUND: "inbound", DNS: "dns"}
FAR_PORTS = (*PORTS, *LISTENERS)

OWNERS = ("0", "1000", "1337", "2000-2010", "2005", "70000", "1000,2005")
PORT_LISTS = (
    "80",
    "53,443",
    "6000-6050",
    "8080,9000-9100",
    "1-1023",
    ",".join(str(port) for port in range(6001, 6100, 3)) + ",80",
)
CIDRS = (
    "10.0.2.2,fd00:2::2",
    "10.0.2.0/24,fd00:2::/64",
    "10.0.1.1",
    "fd00:1::/64",
    "10.0.4.0/24,fd00:4::1,10.0.3.0/24,fd00:3::/64",
)
# Option -> the texts it is drawn from; most keep their default in most configurations.
CHOSEN = {
    "inbound": ("redirect", "redirect", "tproxy", "tproxy", "off"),
    "outbound": ("redirect", "redirect", "tproxy", "tproxy", "off"),
    "udp": ("off", "tproxy"),
    "dns": ("off", "resolv-conf", "all"),
    "ip_family": ("auto", "auto", "v4", "v6"),
    "uncovered_family": ("block", "bypass"),
    "original_source": ("false", "false", "true"),
    "drop_invalid": ("false", "true"),
    "before_proxy": ("block", "block", "bypass"),
}
SELDOM = {
    "proxy_uid": ("1337", "1337,2005", "70000", ""),
    "proxy_gid": ("1337", "", "2000-2003"),
    "proxy_mark": ("0x10000/0x10000",),
    "include_uids": OWNERS,
    "exclude_uids": OWNERS,
    "include_gids": OWNERS,
    "exclude_gids": OWNERS,
    "include_inbound_ports": PORT_LISTS,
    "exclude_inbound_ports": PORT_LISTS,
    "include_outbound_ports": PORT_LISTS,
    "exclude_outbound_ports": PORT_LISTS,
    "exclude_inbound_cidrs": CIDRS,
    "include_outbound_cidrs": CIDRS,
    "exclude_outbound_cidrs": CIDRS,
    "exclude_outbound_for_uids": ("tcp:80:1000", "udp:53:2000-2010;*:443:1000", "2005", "*:6000-6050,80:0,1000"),
    "exclude_interfaces": ("eth1", "virt0"),
    "virtual_interfaces": ("virt0",),
    "tunnel_port": ("9090",),
    "probe_port": ("8080",),
    "admin_port": ("8090", "off"),
    "tproxy_mark": ("0x10/0xff",),
}
IDS = (0, 1000, 1337, 2000, 2005, 70000)
MARKS = (0, 0, 0, 0x10000, 0x20000)


@pytest.fixture(scope="module")
def walked(w: World, backend: str) -> Iterator[World]:
    """The network, with resolvers, and nothing of ours left in it."""
    with resolv_conf(w.pod, *(net.resolver for net in NETS.values())):
        try:
            yield w
        finally:
            capture.disable(netns=w.pod.name)


def test_short(walked: World, backend: str) -> None:
    assert_agreement(walked, backend, random.Random(f"short {backend}"), SHORT[backend])


@pytest.mark.torture
def test_long(walked: World, backend: str) -> None:
    assert_agreement(walked, backend, random.Random(f"long {backend}"), LONG[backend])


def assert_agreement(w: World, backend: str, chance: random.Random, count: int) -> None:
    """`count` random configurations, PAIRS_PER_CONFIG packets each."""
    for _ in range(count):
        texts, config = draw_config(backend, chance)
        plan = enable_anew(w, config, is_announced=chance.random() < 0.5)
        pairs = [draw_packet(w, plan, chance) for _ in range(PAIRS_PER_CONFIG)]
        expected = [expected_answer(walk(plan, packet), packet) for _, packet in pairs]
        found = ask_as_expected([question for question, _ in pairs], expected)
        wrong = [
            f"{packet}: kernel {kernel}, walk {wanted}"
            for (_, packet), kernel, wanted in zip(pairs, found, expected, strict=True)
            if kernel != wanted
        ]
        assert wrong == [], f"{len(wrong)} of {len(pairs)} under {texts}"
        forget_connections(w.pod)


def enable_anew(w: World, config: Config, *, is_announced: bool) -> Plan:
    """Capture by `config`; with --before-proxy bypass before or after the proxy's announcement."""
    if config.before_proxy == "bypass":
        capture.disable(netns=w.pod.name)
    plan = capture.enable(config, netns=w.pod.name, had_rules=is_announced).plan
    assert plan.announced == (bool(plan.waiting) and is_announced)
    return plan


def draw_config(backend: str, chance: random.Random) -> tuple[dict[str, str], Config]:
    """A valid configuration, as texts and parsed."""
    while True:
        texts = {name: chance.choice(choices) for name, choices in CHOSEN.items()}
        texts |= {name: chance.choice(choices) for name, choices in SELDOM.items() if chance.random() < 0.12}
        try:
            return texts, options(backend=backend, **texts)
        except ConfigError:
            continue


def draw_packet(w: World, plan: Plan, chance: random.Random) -> tuple[Question, Packet]:
    """One packet, as what to ask for and as walk() takes it."""
    net = NETS[chance.choice(("v4", "v6"))]
    way = chance.choice((_outgoing, _outgoing, _to_itself, _incoming, _from_guest))
    while True:
        question, packet = way(w, net, plan, chance)
        packet = replace(packet, announced=plan.announced or not plan.waiting)
        # What announces the proxy changes what becomes of all after it.
        announces = any(isinstance(step.rule.verdict, Announce) for step in walk(plan, packet).steps)
        if packet.announced or not announces:
            return question, packet


def _outgoing(w: World, net: Net, plan: Plan, chance: random.Random) -> tuple[Question, Packet]:
    who = chance.choice(("server", "server", "other", "resolver", "stray_resolver", "far", "far_eth1"))
    by_eth1 = who == "far_eth1"
    question = _question(w, net.at(who, chance.choice(FAR_PORTS)), chance)
    return question, _sent(question, net.pod_eth1 if by_eth1 else net.pod, "eth1" if by_eth1 else "eth0", plan)


def _to_itself(w: World, net: Net, plan: Plan, chance: random.Random) -> tuple[Question, Packet]:
    who = chance.choice(("pod", "pod", "loopback", "pod_eth1"))
    as_leg = chance.random() < 0.3 and (net.family == "v4" or plan.inbound_source_v6)
    question = _question(w, net.at(who, chance.choice(PORTS)), chance, net.at("inbound_source", 0) if as_leg else None)
    return question, _sent(question, net.inbound_source if as_leg else getattr(net, who), "lo", plan)


def _question(w: World, to: str, chance: random.Random, source: str | None = None) -> Question:
    uid = chance.choice(IDS)
    gid = uid if chance.random() < 0.5 else chance.choice(IDS)
    proto = chance.choice(("tcp", "udp"))
    return Question(w.pod, to, proto, uid=uid, gid=gid, mark=chance.choice(MARKS), source=source)


def _sent(question: Question, source: str, interface: str, plan: Plan) -> Packet:
    address, port = split(question.to)
    return Packet(
        proto=Proto(question.proto),
        src=ipaddress.ip_address(source),
        dst=ipaddress.ip_address(address),
        dport=port,
        uid=question.uid,
        gid=question.gid,
        out_interface=interface,
        mark=question.mark,
        local=_local(plan),
    )


def _incoming(w: World, net: Net, plan: Plan, chance: random.Random) -> tuple[Question, Packet]:
    source, to, interface = chance.choice((("far", "pod", "eth0"), ("other", "pod", "eth0"), ("far_eth1", "pod_eth1", "eth1")))
    port = chance.choice(PORTS)
    question = Question(w.far, net.at(to, port), chance.choice(("tcp", "udp")), uid=0, source=net.at(source, 0))
    return question, _received(question, getattr(net, source), interface, plan)


def _from_guest(w: World, net: Net, plan: Plan, chance: random.Random) -> tuple[Question, Packet]:
    who = chance.choice(("server", "other", "resolver", "gateway", "pod"))
    question = Question(w.guest, net.at(who, chance.choice(PORTS)), chance.choice(("tcp", "udp")))
    return question, _received(question, net.guest, "virt0", plan)


def _received(question: Question, source: str, interface: str, plan: Plan) -> Packet:
    address, port = split(question.to)
    return Packet(
        proto=Proto(question.proto),
        src=ipaddress.ip_address(source),
        dst=ipaddress.ip_address(address),
        dport=port,
        in_interface=interface,
        local=_local(plan),
    )


def _local(plan: Plan) -> frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    names = ["pod", "pod_eth1", "gateway", *(["inbound_source"] if plan.inbound_source_v6 else [])]
    return frozenset(ipaddress.ip_address(getattr(net, name)) for net in NETS.values() for name in names)


def expected_answer(outcome: Outcome, packet: Packet) -> str:
    """Who answers if walk() is right."""
    if outcome.fate == "dropped":
        return "lost"
    if outcome.fate == "captured":
        return LISTENERS[outcome.port or 0]
    return "app" if packet.is_local(packet.dst) else "far"


def ask_as_expected(questions: list[Question], expected: list[str]) -> list[str]:
    """Who answers, in order; those that should be lost are asked for apart, so that the others need no short deadline."""
    found: dict[int, str] = {}
    for lost in (False, True):
        numbers = [number for number, wanted in enumerate(expected) if (wanted == "lost") is lost]
        answers = ask_all([questions[number] for number in numbers], **({"timeout_s": LOST_S} if lost else {}))
        found |= {number: answer.by for number, answer in zip(numbers, answers, strict=True)}
    # A datagram may be lost on a busy machine; one that a rule drops is lost every time.
    again = [number for number, by in found.items() if by == "lost" != expected[number] and questions[number].proto == "udp"]
    found |= dict(zip(again, (answer.by for answer in ask_all([questions[number] for number in again])), strict=True))
    return [found[number] for number in range(len(questions))]
