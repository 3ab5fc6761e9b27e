"""The policy that BPF programs read decides as the plan does, and is the same when it is read back."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from interceptor.plan.walk import Packet, walk
from interceptor.render.connect_bytes import KEY, Placed, pack, pack_lists, unpack
from interceptor.render.connect_policy import (
    FACT_CGROUP,
    FACT_MARK,
    FACT_V4,
    FACT_V6,
    FIRST_LIST,
    Does,
    Members,
    Policy,
    compile_policy,
)
from interceptor.values import Proto, contains
from tests.property.strategies import outbound_packets
from tests.property.test_walk import Case, planned


def proxy_port(policy: Policy, packet: Packet) -> int | None:
    """What the programs do with a connection: the proxy's port, or None for what goes on as it is."""
    facts = {FACT_V4 if packet.dst.version == 4 else FACT_V6}
    if policy.mark is not None and policy.mark.matches(packet.mark):
        facts.add(FACT_MARK)
    if policy.cgroup is not None and policy.cgroup == packet.cgroup:
        facts.add(FACT_CGROUP)
    facts |= {FIRST_LIST + number for number, members in enumerate(policy.lists) if is_member(members, packet)}
    start = 0
    for number, line in enumerate(policy.lines):
        if number >= start and facts.issuperset(line.needs):
            if line.does is not Does.GOTO:
                return line.argument or None
            start = line.argument
    raise AssertionError("no line decides")


def is_member(members: Members, packet: Packet) -> bool:
    """Whether a list holds what it is about."""
    return (
        any(packet.dst.version == network.version and packet.dst in network for network in members.networks)
        or contains(members.ports, packet.dport)
        or contains(members.uids, packet.uid or 0)
        or contains(members.gids, packet.gid or 0)
    )


@given(st.data(), planned(outbound="connect"))
def test_policy_decides_as_the_plan_does(data: st.DataObject, case: Case) -> None:
    config, plan = case
    packet = replace(data.draw(outbound_packets(config)), proto=Proto.TCP)
    assume(packet.dst != packet.src or packet.out_interface == "lo")
    outcome = walk(plan, packet)

    policy, _ = compile_policy(plan.connect)

    assert proxy_port(policy, packet) == (outcome.port if outcome.mechanism == "connect" else None)


@given(planned(outbound="connect"))
def test_policy_is_read_back_as_it_was_written(case: Case) -> None:
    _, plan = case
    policy, whys = compile_policy(plan.connect)

    found = unpack(pack(policy, Placed(7, 1, cgroup=5)), pack_lists(policy))

    assert found == replace(policy, cgroup="5" if policy.cgroup else None)
    assert len(whys) == len(policy.lines)


@given(st.data(), planned(outbound="connect"))
def test_the_longest_prefix_knows_every_list(data: st.DataObject, case: Case) -> None:
    config, plan = case
    policy, _ = compile_policy(plan.connect)
    entries = {KEY.unpack(key): int.from_bytes(value, "little") for key, value in pack_lists(policy).items()}
    packet = data.draw(outbound_packets(config))
    of, bits = (1, 32) if packet.dst.version == 4 else (2, 128)
    address = int(packet.dst)

    found = 0
    for length in range(bits, -1, -1):
        packed = (address >> bits - length << bits - length).to_bytes(bits // 8, "big").ljust(19, b"\0")
        if (8 + length, of, packed) in entries:
            found = entries[8 + length, of, packed]
            break

    holding = [number for number, members in enumerate(policy.lists) if is_member(Members(members.networks), packet)]
    assert found == sum(1 << (FIRST_LIST + number) for number in holding)
