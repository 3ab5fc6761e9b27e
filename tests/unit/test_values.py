"""Typed values: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import ipaddress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.values import (
    MAX_ID,
    Family,
    IdRange,
    Mark,
    PortRange,
    Proto,
    UidRule,
    contains,
    join,
    kernel_text,
    merge,
    parse_cidrs,
    parse_ids,
    parse_ifname,
    parse_mark,
    parse_port,
    parse_ports,
    parse_uid_rules,
)

USERS = {"root": 0, "istio-proxy": 1337, "app": 1000}
lookup = USERS.__getitem__


@pytest.mark.parametrize(
    "text", ["0", "65536", "70000", "-1", "+80", "8_0", "0x50", "foo", "", " ", "８０", "80.0", "9" * 5000]
)
def test_text_that_is_no_port_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="is no port: a number from 1 to 65535") as refused:
        parse_port(text)

    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("80", "80", id="single"),
        pytest.param("443,80", "80,443", id="sorted"),
        pytest.param("80,80", "80", id="twice"),
        pytest.param("80-90,85-95", "80-95", id="overlapping"),
        pytest.param("80,81,82", "80-82", id="adjacent"),
        pytest.param(" 80 , 443 ,", "80,443", id="blanks and trailing comma"),
        pytest.param("6000-6000", "6000", id="range of one"),
        pytest.param("1-65535", "1-65535", id="everything"),
        pytest.param("*", "", id="star"),
        pytest.param("", "", id="empty"),
    ],
)
def test_port_list_becomes_canonical(text: str, expected: str) -> None:
    assert join(parse_ports(text)) == expected


def test_reversed_range_is_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError, match="'90-80' runs backwards; write 80-90"):
        parse_ports("443,90-80")


@pytest.mark.parametrize("text", ["80-", "-80", "80--90", "80-90-100", "80:90", "80 90", "80;90", "80,*", "80-x"])
def test_malformed_port_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no port"):
        parse_ports(text)


def test_bad_port_is_named_among_many_good_ones() -> None:
    with pytest.raises(ValueError, match="'70000' is no port"):
        parse_ports("80,443,70000,8080")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("0", "0", id="root"),
        pytest.param("app,root", "0,1000", id="names"),
        pytest.param("istio-proxy", "1337", id="name with a dash"),
        pytest.param("1000-1010,5", "5,1000-1010", id="range"),
        pytest.param(str(MAX_ID), str(MAX_ID), id="largest"),
        pytest.param("70000", "70000", id="above 16 bits"),
    ],
)
def test_id_list_becomes_canonical(text: str, expected: str) -> None:
    assert join(parse_ids(text, lookup)) == expected


@pytest.mark.parametrize("text", [str(MAX_ID + 1), "-1", "1-", "10-5", "1 2", "*", "no body"])
def test_malformed_id_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no id|runs backwards|no user or group"):
        parse_ids(text, lookup)


def test_unknown_name_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="no user or group is named 'envoy' here; give its number"):
        parse_ids("1000,envoy", lookup)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("10.0.0.0/8", ["10.0.0.0/8"], id="v4"),
        pytest.param("fd00::/8,10.0.0.0/8", ["10.0.0.0/8", "fd00::/8"], id="both families"),
        pytest.param("10.1.2.3", ["10.1.2.3/32"], id="address"),
        pytest.param("10.0.0.0/8,10.1.0.0/16", ["10.0.0.0/8"], id="overlapping"),
        pytest.param("10.0.0.0/9,10.128.0.0/9", ["10.0.0.0/8"], id="adjacent"),
        pytest.param("*", [], id="star"),
    ],
)
def test_cidr_list_becomes_canonical(text: str, expected: list[str]) -> None:
    assert [str(network) for network in parse_cidrs(text)] == expected


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "example.com", "fd00::/129", "10.0.0", "::1%lo/128x"])
def test_malformed_cidr_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write 10.0.0.0/8 or fd00::/8"):
        parse_cidrs(text)


@pytest.mark.parametrize("text", ["", "eth0 ", "a" * 16, "eth0/1", "eth+", '"', "!lo", "..", "é", "eth0\n"])
def test_text_that_is_no_interface_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no interface name"):
        parse_ifname(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1337", Mark(1337), id="decimal"),
        pytest.param("0x539/0xfff", Mark(0x539, 0xFFF), id="hexadecimal with mask"),
        pytest.param("0xffffffff", Mark(0xFFFFFFFF), id="largest"),
    ],
)
def test_mark_is_parsed(text: str, expected: Mark) -> None:
    assert parse_mark(text) == expected


@pytest.mark.parametrize("text", ["0", "", "foo", "1/0", "0x100000000", "2/1", "1/", "/1", "-1", "1/2/3"])
def test_malformed_mark_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mark"):
        parse_mark(text)


def test_mark_sets_only_its_masks_bits() -> None:
    assert Mark(0x5, 0xF).put(0xFFF0) == 0xFFF5
    assert Mark(0x5, 0xF).matches(0xFFF5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1000", [UidRule(tuple(Proto), (), (IdRange(1000, 1000),))], id="uids"),
        pytest.param("tcp:1000", [UidRule((Proto.TCP,), (), (IdRange(1000, 1000),))], id="proto and uids"),
        pytest.param(
            "udp:53,80-90:app,5",
            [UidRule((Proto.UDP,), (PortRange(53, 53), PortRange(80, 90)), (IdRange(5, 5), IdRange(1000, 1000)))],
            id="all",
        ),
        pytest.param("tcp:*:1;*:80:2", [
            UidRule((Proto.TCP,), (), (IdRange(1, 1),)),
            UidRule(tuple(Proto), (PortRange(80, 80),), (IdRange(2, 2),)),
        ], id="two"),
    ],
)  # fmt: skip
def test_uid_rules_are_parsed(text: str, expected: list[UidRule]) -> None:
    assert list(parse_uid_rules(text, lookup)) == expected


@pytest.mark.parametrize("text", ["icmp:1", "tcp:80:", "tcp:80:1:2", "tcp:0:1", ":", "tcp:80:nobody-here", "80:1"])
def test_malformed_uid_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_uid_rules(text, lookup)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 20)).map(lambda pair: PortRange(pair[0], sum(pair)))))
def test_merging_keeps_every_member_and_leaves_gaps_between_ranges(ranges: list[PortRange]) -> None:
    merged = merge(ranges)

    assert [contains(merged, port) for port in range(1, 322)] == [contains(ranges, port) for port in range(1, 322)]
    assert all(one.last + 1 < other.first for one, other in pairwise(merged))


@given(st.ip_addresses(), st.integers(0, 32))
def test_cidrs_keep_their_members(address: object, prefix: int) -> None:
    networks = parse_cidrs(f"{address}")

    assert [str(network.network_address) for network in networks] == [str(address)]
    assert {Family.of(network) for network in networks} == {Family.of(address)}  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["::ffff:1.2.3.4", "::1.2.3.4", "::1", "::", "::ffff:0.0.0.0", "64:ff9b::102:304", "10.0.0.1"])
def test_an_address_is_written_as_the_kernels_tools_write_it(text: str) -> None:
    assert kernel_text(ipaddress.ip_address(text)) == text


def test_a_scope_in_a_cidr_is_refused_not_dropped() -> None:
    with pytest.raises(ValueError, match="scope"):
        parse_cidrs("fe80::1%eth0")


def test_every_bad_item_of_a_list_is_named() -> None:
    with pytest.raises(ValueError, match="6100-6000.*'0'.*'x'"):
        parse_ports("6100-6000,80,0,x")


@pytest.mark.parametrize("text", ["1_0", "0x1_0", "0b1", "0o7", "١", "+1", "010", "1" * 5000, "0x" + "f" * 5000, "1/0b1"])
def test_a_mark_in_another_notation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="VALUE or VALUE/MASK"):
        parse_mark(text)
