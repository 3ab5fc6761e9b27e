"""The invariants that `walk` can show, over sampled Configs, hosts and packets."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from interceptor.config import Config
from interceptor.plan.build import build_plan
from interceptor.plan.model import TERMINAL, Goto, HostFacts, Jump, Match
from interceptor.plan.walk import Outcome, Packet, walk
from interceptor.values import Family, IdRange, PortRange, Proto, UidRule, merge, parse_cidrs
from tests.property.strategies import (
    LOCAL,
    LOOPBACK,
    OWN,
    announces,
    configs,
    facts,
    inbound_packets,
    is_proxys,
    outbound_packets,
)

NO_IDENTITY = {"uid": 4242, "gid": 4242, "mark": 0, "cgroup": None}


@dataclass(frozen=True, slots=True)
class Case:
    """A Config and a host where it is possible. Unpacks to the Config and its plan, which is too long for a report."""

    config: Config
    host: HostFacts

    def __iter__(self) -> Iterator[Any]:
        return iter((self.config, build_plan(self.config, self.host)))


@st.composite
def planned(draw: st.DrawFn, **fixed: Any) -> Case:
    """Cases; `fixed` fields of the Config have the given values."""
    config = draw(configs(**fixed))
    return Case(config, draw(facts(config)))


def fate(outcome: Outcome) -> tuple[str, int | None, str | None]:
    return outcome.fate, outcome.port, outcome.mechanism


@given(st.data(), planned())
def test_proxys_traffic_is_never_captured_outbound_except_its_self_call_as_inbound(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = data.draw(outbound_packets(config))
    assume(is_proxys(config, packet) and not announces(config, packet))

    outcome = walk(plan, packet)

    if packet.dst in LOCAL and not packet.dst.is_loopback:
        assert outcome.port in (None, config.inbound_port)
    else:
        assert fate(outcome) == ("direct", None, None)


@given(st.data(), planned(proxy_uid=(IdRange(1337, 1338), IdRange(70000, 70000))))
def test_all_listed_proxy_uids_behave_alike(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = data.draw(outbound_packets(config))

    fates = {fate(walk(plan, replace(packet, uid=uid))) for uid in (1337, 1338, 70000)}

    assert len(fates) == 1


OUTBOUND_EXCLUSIONS: dict[str, Callable[[Packet], Any]] = {
    "exclude_outbound_ports": lambda packet: (PortRange(packet.dport, packet.dport),),
    "exclude_outbound_cidrs": lambda packet: parse_cidrs(str(packet.dst)),
    "exclude_uids": lambda packet: (IdRange(packet.uid or 0, packet.uid or 0),),
    "exclude_gids": lambda packet: (IdRange(packet.gid or 0, packet.gid or 0),),
    "exclude_outbound_for_uids": lambda packet: (
        UidRule((packet.proto,), (PortRange(packet.dport, packet.dport),), (IdRange(packet.uid or 0, packet.uid or 0),)),
    ),
    "exclude_interfaces": lambda packet: (packet.out_interface,),
}


def included(config: Config, packet: Packet) -> Config:
    """`config`, with everything there is to include about the packet included."""
    number = packet.uid
    uids = () if number is None else merge((*config.include_uids, IdRange(number, number)))
    ports = (PortRange(packet.dport, packet.dport),)
    return replace(config, include_outbound_ports=ports, include_inbound_ports=ports, include_uids=uids, virtual_interfaces=())


@pytest.mark.parametrize("name", OUTBOUND_EXCLUSIONS)
@given(data=st.data(), config=configs())
def test_outbound_exclusion_beats_every_inclusion(name: str, data: st.DataObject, config: Config) -> None:
    packet = data.draw(outbound_packets(config))
    assume(not is_proxys(config, packet) and not config.family_excluded(Family.of(packet.dst)))
    by = replace(config, outbound="redirect") if (name, config.outbound) == ("exclude_interfaces", "connect") else config
    excluding = replace(included(by, packet), **{name: OUTBOUND_EXCLUSIONS[name](packet)})

    outcome = walk(build_plan(excluding, data.draw(facts(excluding))), packet)

    assert fate(outcome) == ("direct", None, None)


INBOUND_EXCLUSIONS: dict[str, Callable[[Packet], Any]] = {
    "exclude_inbound_ports": OUTBOUND_EXCLUSIONS["exclude_outbound_ports"],
    "exclude_inbound_cidrs": lambda packet: parse_cidrs(str(packet.src)),
    "exclude_interfaces": lambda packet: (packet.in_interface,),
}


@pytest.mark.parametrize("name", INBOUND_EXCLUSIONS)
@given(data=st.data(), config=configs())
def test_inbound_exclusion_beats_every_inclusion(name: str, data: st.DataObject, config: Config) -> None:
    packet = data.draw(inbound_packets(config))
    assume(not config.family_excluded(Family.of(packet.dst)))
    by = replace(config, outbound="redirect") if (name, config.outbound) == ("exclude_interfaces", "connect") else config
    excluding = replace(included(by, packet), **{name: INBOUND_EXCLUSIONS[name](packet)})

    outcome = walk(build_plan(excluding, data.draw(facts(excluding))), packet)

    assert fate(outcome) == ("direct", None, None)


@given(planned())
def test_no_rule_follows_an_unconditional_terminal_one(case: Case) -> None:
    _, plan = case
    for chain in plan.all_chains:
        ends = [rule.match == Match() and isinstance(rule.verdict, TERMINAL) for rule in chain.rules]
        assert not any(ends[:-1]), chain.name


@given(planned())
def test_every_jump_has_a_target_in_its_own_table(case: Case) -> None:
    _, plan = case
    targets = {
        (chain.table, rule.verdict.chain)
        for chain in plan.all_chains
        for rule in chain.rules
        if isinstance(rule.verdict, Jump | Goto)
    }

    assert targets <= {(chain.table, chain.name) for chain in plan.all_chains if chain.hook is None}


@given(planned())
def test_every_chain_without_a_hook_is_jumped_to(case: Case) -> None:
    _, plan = case
    targets = {
        (chain.table, rule.verdict.chain)
        for chain in plan.all_chains
        for rule in chain.rules
        if isinstance(rule.verdict, Jump | Goto)
    }

    assert {(chain.table, chain.name) for chain in plan.all_chains if chain.hook is None} <= targets


@given(planned())
def test_chain_names_are_unique_within_a_table(case: Case) -> None:
    _, plan = case
    names = [(chain.table, chain.name) for chain in plan.all_chains]

    assert len(names) == len(set(names))


@given(st.data(), configs())
def test_equal_configs_give_equal_plans(data: st.DataObject, config: Config) -> None:
    host = data.draw(facts(config))

    assert build_plan(config, host) == build_plan(replace(config), host)


@given(st.data(), configs())
def test_the_plan_for_what_a_plan_left_in_the_kernel_is_the_same(data: st.DataObject, config: Config) -> None:
    host = data.draw(facts(config))
    plan = build_plan(config, host)
    left = data.draw(st.permutations(plan.routes))

    assert build_plan(config, replace(host, earlier_routes=tuple(left))) == plan


@st.composite
def uncovered(draw: st.DrawFn, policy: str) -> tuple[Config, Config, HostFacts, Family]:
    """A Config that covers one family, the same covering both, a host with both, and the family left out."""
    config = draw(configs(ip_family=draw(st.sampled_from(("v4", "v6"))), uncovered_family=policy))
    left_out = Family.V6 if config.ip_family == "v4" else Family.V4
    return config, replace(config, ip_family="dual"), draw(facts(replace(config, ip_family="dual"))), left_out


@given(st.data(), uncovered("bypass"))
def test_uncovered_family_bypasses_when_told(data: st.DataObject, case: tuple[Config, Config, HostFacts, Family]) -> None:
    config, _, host, family = case
    packet = data.draw(st.one_of(outbound_packets(config, (family,)), inbound_packets(config, (family,))))

    assert fate(walk(build_plan(config, host), packet)) == ("direct", None, None)


@given(st.data(), uncovered("block"))
def test_uncovered_family_is_blocked_exactly_where_it_would_be_captured(
    data: st.DataObject, case: tuple[Config, Config, HostFacts, Family]
) -> None:
    config, covering, host, family = case
    packet = data.draw(st.one_of(outbound_packets(config, (family,)), inbound_packets(config, (family,))))
    # The proxy calling its own pod would be captured as inbound, but is not worth blocking: it leaves no pod.
    assume(packet.in_interface is not None or not is_proxys(config, packet))
    would_be = walk(build_plan(covering, host), packet).fate

    outcome = walk(build_plan(config, host), packet)

    assert outcome.fate == ("dropped" if would_be == "captured" else "direct")


@given(st.data(), planned(virtual_interfaces=("docker0",), exclude_interfaces=()))
def test_tcp_from_a_virtual_interface_is_never_captured_as_inbound(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = replace(data.draw(inbound_packets(config)), in_interface="docker0", proto=Proto.TCP)
    assume(config.outbound != "off")

    assert walk(plan, packet).port in (None, config.outbound_port, config.dns_port)


@given(st.data(), planned(dns="all"))
def test_dns_to_any_server_goes_to_the_dns_port(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = replace(data.draw(outbound_packets(config, plan.families)), dport=53, **NO_IDENTITY, out_interface="eth0")
    assume(packet.dst not in LOCAL)
    assume(not config.exclude_outbound_cidrs and not config.exclude_outbound_ports)
    assume(not any(rule.ports == () or 53 in range(rule.ports[0].first, 65536) for rule in config.exclude_outbound_for_uids))

    assert fate(walk(plan, packet)) == ("captured", config.dns_port, "redirect")


@given(st.data(), planned())
def test_what_is_captured_goes_to_a_port_of_the_proxy(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = data.draw(st.one_of(outbound_packets(config), inbound_packets(config)))

    outcome = walk(plan, packet)

    assert outcome.port in (None, config.outbound_port, config.inbound_port, config.dns_port)
    assert (outcome.port is None) == (outcome.fate != "captured")


@given(st.data(), planned())
def test_application_to_loopback_is_direct(data: st.DataObject, case: Case) -> None:
    config, plan = case
    family = data.draw(st.sampled_from(Family))
    dport = data.draw(st.sampled_from((22, 80, 443, 15001, 15006)))  # not DNS: a resolver may stand on 127.0.0.53
    dst = data.draw(st.sampled_from((OWN[family], LOOPBACK[family])))
    packet = replace(
        data.draw(outbound_packets(config)), src=dst, dst=dst, dport=dport, out_interface="lo", mark=0, cgroup=None
    )
    assume(not is_proxys(config, packet))

    assert fate(walk(plan, packet)) == ("direct", None, None)


def test_self_call_of_the_proxy_is_inbound() -> None:
    own = ipaddress.ip_address("10.1.0.2")
    packet = Packet(Proto.TCP, own, own, 80, uid=1337, gid=1337, out_interface="lo", local=frozenset({own}))

    assert fate(walk(build_plan(Config(), HostFacts()), packet)) == ("captured", 15006, "redirect")


@given(st.data(), planned(before_proxy="bypass"))
def test_before_the_proxy_nothing_outbound_is_captured_or_dropped(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = replace(data.draw(outbound_packets(config)), announced=False)
    assume(not is_proxys(config, packet))

    assert fate(walk(plan, packet)) == ("direct", None, None)


@given(st.data(), planned(before_proxy="bypass", virtual_interfaces=("docker0",), exclude_interfaces=()))
def test_before_the_proxy_a_virtual_interfaces_tcp_is_let_through(data: st.DataObject, case: Case) -> None:
    config, plan = case
    drawn = data.draw(inbound_packets(config, plan.families))
    packet = replace(drawn, in_interface="docker0", proto=Proto.TCP, announced=False)
    assume(config.outbound != "off")

    assert fate(walk(plan, packet)) == ("direct", None, None)


@given(st.data(), planned(before_proxy="bypass", virtual_interfaces=()))
def test_before_the_proxy_inbound_is_as_ever(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = data.draw(inbound_packets(config))

    assert fate(walk(plan, replace(packet, announced=False))) == fate(walk(plan, packet))


@given(st.data(), planned(before_proxy="bypass"))
def test_after_the_announcement_it_is_as_if_there_had_been_no_bypass(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = data.draw(st.one_of(outbound_packets(config), inbound_packets(config)))
    blocking = build_plan(replace(config, before_proxy="block"), case.host)

    outcome = walk(plan, packet)

    if announces(config, packet):
        assert outcome.fate in ("dropped", walk(blocking, packet).fate)
    else:
        assert fate(outcome) == fate(walk(blocking, packet))
