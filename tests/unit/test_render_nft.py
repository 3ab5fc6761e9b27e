"""Rules as nft writes them."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from interceptor.config import Config
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts, Log, Match, Return, Rule, SetConnmark, SetMark, Table, Tproxy, Verdict
from interceptor.render import nft
from interceptor.values import MAX_MARK, Family, IdRange, Mark, PortRange, Proto

BOTH = (Family.V4, Family.V6)
RETURN = Return()


def lines(match: Match, verdict: Verdict = RETURN, families: tuple[Family, ...] = BOTH) -> list[str]:
    rule = Rule(match, verdict, "w", "--o")
    return [line.removesuffix(' comment "w"').replace("counter ", "") for line in nft.statements(Table.MANGLE, rule, families)]


def test_networks_of_both_families_take_a_line_each() -> None:
    match = Match(dst=(ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::1/128")))

    assert lines(match) == ["ip daddr 10.0.0.0/8 return", "ip6 daddr fd00::1 return"]


def test_source_and_destination_of_different_families_match_nothing() -> None:
    assert lines(Match(src=(ipaddress.ip_network("10.0.0.0/8"),), dst=(ipaddress.ip_network("fd00::/8"),))) == []


def test_any_number_of_ports_takes_one_line() -> None:
    match = Match(proto=Proto.TCP, dports=tuple(PortRange(port, port + 1) for port in range(1, 100, 3)))

    assert len(lines(match)) == 1


def test_uids_and_gids_of_one_match_are_alternatives() -> None:
    assert lines(Match(uids=(IdRange(1, 2), IdRange(5, 5)), gids=(IdRange(7, 7),))) == [
        "meta skuid { 1-2, 5 } return",
        "meta skgid 7 return",
    ]


def test_tproxy_without_a_listener_drops_as_xt_tproxy_does() -> None:
    assert lines(Match(proto=Proto.TCP), Tproxy(15001, Mark(1))) == [
        "meta l4proto tcp meta mark set 0x00000001 tproxy to :15001 accept",
        "meta l4proto tcp drop",
    ]


def test_tproxy_of_one_family_names_it_as_nft_demands() -> None:
    assert "tproxy ip6 to :15001" in lines(Match(family=Family.V6, proto=Proto.TCP), Tproxy(15001, Mark(1)))[0]


def test_clearing_a_masked_mark_keeps_the_other_bits() -> None:
    assert lines(Match(), SetConnmark(Mark(0, 0xFFF))) == ["ct mark set ct mark & 0xfffff000"]


@pytest.mark.parametrize("mark", [Mark(0x539, 0xFFF), Mark(1, 1), Mark(0x10000, 0xFF0000), Mark(7)], ids=str)
def test_mark_as_nft_writes_it_does_what_mark_put_does(mark: Mark) -> None:
    words = lines(Match(), SetMark(mark))[0].removeprefix("meta mark set ").replace("meta mark ", "mark ")

    for before in (0, MAX_MARK, 0x12345678):
        assert eval(words, {"mark": before}) == mark.put(before)


def test_log_rule_has_no_counter_for_it_decides_nothing() -> None:
    assert next(nft.statements(Table.NAT, Rule(Match(), Log("p: "), "w", "--o"), BOTH)) == 'log prefix "p: " comment "w"'


def test_script_replaces_the_whole_table_in_one_transaction() -> None:
    text = nft.script(build_plan(Config(), HostFacts()))

    assert text.startswith("table inet interceptor\ndelete table inet interceptor\ntable inet interceptor {\n")


def test_parsing_the_rendered_table_gives_its_chains_in_order() -> None:
    plan = build_plan(Config(), HostFacts())
    names = [name for name in nft.parse(nft.table(plan)) if not name.startswith("ct timeout")]

    assert names == [nft.chain_name(chain) for chain in plan.chains]


def test_comments_are_one_a_line_of_the_kernel() -> None:
    plan = build_plan(Config(dns="all", udp="tproxy"), HostFacts())
    parsed = nft.parse(nft.table(plan))

    for chain in plan.chains:
        without_hook = parsed[nft.chain_name(chain)][1 if chain.hook else 0 :]
        assert len(nft.comments(plan)[nft.chain_name(chain)]) == len(without_hook), chain.name


def test_a_mapped_address_is_written_as_nft_lists_it() -> None:
    assert lines(Match(dst=(ipaddress.ip_network("::ffff:0:0/96"),))) == ["ip6 daddr ::ffff:0.0.0.0/96 return"]


def test_flags_of_the_table_are_seen() -> None:
    assert nft.parse("table inet interceptor {\n\tflags dormant\n}\n") == {"table flags": ("flags dormant",)}


def test_what_nft_1_1_lists_is_read_as_what_1_0_lists() -> None:
    new = """table inet interceptor {
\tct timeout itu4 {
\t\tpolicy = { fin_wait : 1m5s, close : 0s }
\t}
\tchain nat_output {
\t\ttcp flags & (fin | syn | rst | ack) == syn counter jump nat_outbound comment "outbound"
\t}
}
"""
    old = new.replace("1m5s", "65").replace("0s", "0").replace("& (fin | syn | rst | ack) == syn", "syn / fin,syn,rst,ack")

    assert nft.parse(new) == nft.parse(old)


def test_the_announcement_is_loaded_with_the_rules_and_no_part_of_what_is_compared() -> None:
    plan = build_plan(Config(before_proxy="bypass"), HostFacts())
    announced = replace(plan, announced=True)

    assert "elements = { 0x00000000 }" in nft.script(announced)
    assert "elements" not in nft.script(plan)
    assert nft.parse(nft.table(announced)) == nft.parse(nft.table(plan))
    assert nft.parse(nft.table(plan))["set announced"] == ("type mark", "size 1", "flags dynamic")
