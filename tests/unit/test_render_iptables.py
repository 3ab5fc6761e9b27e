"""Rules as iptables writes them."""

from __future__ import annotations

import ipaddress

import pytest

from interceptor.plan.model import Chain, Drop, Goto, Hook, Jump, Match, Plan, Return, Rule, Table
from interceptor.render.iptables import port_chunks, restore, restore_table, rules, specs
from interceptor.render.iptables_save import Step, TableRules, parse, steps
from interceptor.render.iptables_switch import GUARD, switch
from interceptor.values import Family, IdRange, PortRange, Proto


def lines(match: Match, family: Family = Family.V4) -> list[str]:
    comment = ' -m comment --comment "w" -j RETURN'
    return [line.removesuffix(comment) for line in specs(Table.NAT, Rule(match, Return(), "w", "--o"), family)]


def test_sixteen_ports_take_two_rules() -> None:
    ports = tuple(PortRange(port, port) for port in range(1, 32, 2))

    assert [len(chunk) for chunk in port_chunks(ports)] == [15, 1]


def test_range_takes_two_of_the_fifteen_slots() -> None:
    ports = tuple(PortRange(port, port + 1) for port in range(1, 100, 10))

    assert [len(chunk) for chunk in port_chunks(ports)] == [7, 3]


def test_uids_and_gids_of_one_match_are_alternatives() -> None:
    match = Match(uids=(IdRange(1, 2), IdRange(5, 5)), gids=(IdRange(7, 7),))

    assert lines(match) == ["-m owner --uid-owner 1-2", "-m owner --uid-owner 5", "-m owner --gid-owner 7"]


def test_networks_of_the_other_family_are_left_out() -> None:
    match = Match(dst=(ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")))

    assert lines(match, Family.V6) == ["-d fd00::/8"]


def test_rule_for_networks_of_one_family_does_not_become_unconditional_in_the_other() -> None:
    assert lines(Match(dst=(ipaddress.ip_network("10.0.0.0/8"),)), Family.V6) == []


def test_rule_of_one_family_is_absent_from_the_other() -> None:
    assert lines(Match(family=Family.V4), Family.V6) == []


def test_alternatives_multiply() -> None:
    match = Match(
        src=(ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("11.0.0.0/8")), uids=(IdRange(1, 1), IdRange(3, 3))
    )

    assert len(lines(match)) == 4


def test_cgroup_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="cgroup"):
        lines(Match(cgroup="a"))


def test_chain_that_no_packet_of_the_family_reaches_is_absent() -> None:
    plan = Plan(
        (Family.V4, Family.V6),
        (
            Chain(Table.NAT, "SIX", (Rule(Match(), Drop(), "w", "--o"),)),
            Chain(Table.NAT, "OUTPUT", (Rule(Match(family=Family.V6), Jump("SIX"), "w", "--o"),), Hook.OUTPUT),
        ),
    )

    assert (rules(plan, Family.V4), list(rules(plan, Family.V6)["nat"].chains)) == ({}, ["INTERCEPT_SIX", "INTERCEPT_OUTPUT"])


def test_goto_and_jump_are_told_apart() -> None:
    written = [next(specs(Table.NAT, Rule(Match(), verdict, "w", "--o"), Family.V4)) for verdict in (Jump("A"), Goto("A"))]

    assert [line.split()[-2] for line in written] == ["-j", "-g"]


def test_restore_of_nothing_to_nothing_is_empty() -> None:
    assert restore({}, {}) == ""


def test_restore_removes_stale_chains_after_refilling_the_others_in_one_transaction() -> None:
    present = TableRules(
        {"INTERCEPT_OLD": ["-j RETURN"], "INTERCEPT_OUTPUT": ["-j INTERCEPT_OLD"]}, {"OUTPUT": ["INTERCEPT_OUTPUT"]}
    )
    wanted = TableRules({"INTERCEPT_OUTPUT": ["-j DROP"]}, {"OUTPUT": ["INTERCEPT_OUTPUT"]})

    assert restore_table("nat", wanted, present).splitlines() == [
        "*nat",
        ":INTERCEPT_OUTPUT - [0:0]",
        ":INTERCEPT_OLD - [0:0]",
        "-D OUTPUT -j INTERCEPT_OUTPUT",
        "-I OUTPUT 1 -j INTERCEPT_OUTPUT",
        "-A INTERCEPT_OUTPUT -j DROP",
        "-X INTERCEPT_OLD",
        "COMMIT",
    ]


def test_tcp_syn_and_ports_stand_together() -> None:
    match = Match(proto=Proto.TCP, syn=True, dports=(PortRange(53, 53),))

    assert lines(match) == ["-p tcp -m tcp --dport 53 --tcp-flags FIN,SYN,RST,ACK SYN"]


def test_a_network_of_everything_is_left_out_as_iptables_save_does() -> None:
    match = Match(dst=(ipaddress.ip_network("0.0.0.0/0"),))

    assert lines(match) == ['-m comment --comment "w" -j RETURN']
    assert lines(match, Family.V6) == []


def test_a_mapped_address_is_written_as_iptables_save_does() -> None:
    assert lines(Match(src=(ipaddress.ip_network("::ffff:1.2.3.4/128"),)), Family.V6) == ["-s ::ffff:1.2.3.4/128"]


STRAY = '-p udp -m comment --comment "to the -j INTERCEPT_X" -g INTERCEPT_OUTPUT'
SAVED = f"""*nat
:OUTPUT ACCEPT [0:0]
:INTERCEPT_OUTPUT - [0:0]
-A OUTPUT -j INTERCEPT_OUTPUT
-A OUTPUT {STRAY}
-A OUTPUT -m comment --comment "-j INTERCEPT_OUTPUT" -j ACCEPT
-A INTERCEPT_OUTPUT -p tcp -j RETURN
COMMIT
"""


def test_a_rule_of_others_that_leads_into_our_chain_is_a_stray() -> None:
    table = parse(SAVED)["nat"]

    assert (table.jumps, table.strays) == ({"OUTPUT": ["INTERCEPT_OUTPUT"]}, {"OUTPUT": [STRAY]})


def test_strays_are_deleted_before_the_chain() -> None:
    text = restore({}, parse(SAVED))

    assert [step for _, found in steps(text) for step in found] == [
        Step("make", "INTERCEPT_OUTPUT"),
        Step("delete jump", "OUTPUT", "INTERCEPT_OUTPUT"),
        Step("delete stray", "OUTPUT", STRAY),
        Step("drop", "INTERCEPT_OUTPUT"),
    ]


def test_the_guard_stands_in_the_built_in_chains_of_raw_and_nowhere_else() -> None:
    # Any other chain makes the kernel refuse the whole switch.
    one = {"mangle": TableRules({"INTERCEPT_OUTPUT": ["-j RETURN"]}, {"OUTPUT": ["INTERCEPT_OUTPUT"]})}
    other = {"nat": TableRules({"INTERCEPT_OUTPUT": ["-j RETURN"]}, {"OUTPUT": ["INTERCEPT_OUTPUT"]})}

    inserted = [line.split()[1] for line in switch(other, one, Family.V4).splitlines() if line.endswith(f"-j {GUARD}")]

    assert {chain for chain in inserted if chain != GUARD} == {"PREROUTING", "OUTPUT"}


def test_a_table_that_is_right_is_written_only_when_asked() -> None:
    rules = {"raw": TableRules({"INTERCEPT_SHORT": ["-j CT --timeout itc4"]}, {"OUTPUT": ["INTERCEPT_SHORT"]})}

    assert switch(rules, rules, Family.V4) == ""
    assert "-A INTERCEPT_SHORT -j CT --timeout itc4" in switch(rules, rules, Family.V4, ("raw",)).splitlines()
