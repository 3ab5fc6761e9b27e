"""The table of options: every row works from every source, and contradictions are found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given

from interceptor.config import FIELD, FIELDS, Config, Field, Names, warnings
from interceptor.errors import ConfigError
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts
from interceptor.proxy_options import ProxyOptions
from interceptor.values import Family, IdRange, Mark, PortRange, parse_cidrs
from tests.property.strategies import configs, malformed_texts

NAMES = Names(uid={"root": 0}.__getitem__, gid={"root": 0}.__getitem__)
BY_ROW = pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.name)


def parsed_or_reason(row: Field, text: str) -> str:
    """The value in its canonical text, or why there is none."""
    try:
        return row.kind.show(row.kind.parse(text, NAMES))
    except ValueError as error:
        return f"refused: {error}"


def problems_of(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        Config(**values)
    return [str(problem) for problem in refused.value.problems]


@given(configs())
def test_parsing_what_is_shown_gives_the_value_back(config: Config) -> None:
    for row in FIELDS:
        value = getattr(config, row.name)
        assert row.kind.parse(row.kind.show(value), NAMES) == value, row.name


@BY_ROW
def test_default_is_a_value_that_can_be_written(row: Field) -> None:
    assert row.kind.parse(row.kind.show(row.default), NAMES) == row.default


@BY_ROW
def test_option_is_documented(row: Field) -> None:
    assert row.help.endswith(".")
    assert row.group


@BY_ROW
@given(text=malformed_texts)
def test_any_text_is_parsed_or_refused_with_a_reason(row: Field, text: str) -> None:
    found = parsed_or_reason(row, text)

    assert found.startswith("refused: ") or parsed_or_reason(row, found) == found


def test_default_config_is_valid() -> None:
    assert Config().outbound == "redirect"


@pytest.mark.parametrize("name", ["inbound_port", "dns_port", "tunnel_port", "probe_port"])
def test_two_equal_ports_of_the_proxy_are_refused(name: str) -> None:
    assert problems_of(**{name: 15001})[0].endswith("the proxy's ports must differ")


@pytest.mark.parametrize("name", ["exclude_inbound_cidrs", "include_outbound_cidrs", "exclude_outbound_cidrs"])
@pytest.mark.parametrize(("family", "cidr"), [("v4", "fd00::/8"), ("v6", "10.0.0.0/8")])
def test_cidr_of_the_family_that_is_off_is_refused(name: str, family: str, cidr: str) -> None:
    other = "v6" if family == "v4" else "v4"

    found = problems_of(**{name: parse_cidrs(cidr), "ip_family": family})

    assert found == [f"{FIELD[name].flag}: '{cidr}': an IP{other} CIDR with --ip-family {family}"]


def test_proxy_without_any_identity_is_refused() -> None:
    assert "needs an identity" in problems_of(proxy_uid=(), proxy_gid=())[0]


@pytest.mark.parametrize("backend", ["iptables-nft", "iptables-legacy", "libiptc"])
def test_cgroup_on_a_backend_that_cannot_match_it_is_refused(backend: str) -> None:
    assert "only the nft backend" in problems_of(proxy_cgroup="a/b", backend=backend)[0]


@pytest.mark.parametrize(
    "mark",
    [Mark(0xFFE, 0xFFF), Mark(0x400, 0xF00), Mark(1, 1), Mark(0xFFFFFFFF)],
    ids=["overflow", "gaps", "one bit", "largest"],
)
def test_tproxy_mark_without_room_for_two_more_is_refused(mark: Mark) -> None:
    assert "no room" in problems_of(tproxy_mark=mark)[0]


@pytest.mark.parametrize("mark", [Mark(1337), Mark(0x539, 0xFFF), Mark(1339), Mark(1, 1), Mark(0x10539)], ids=str)
def test_proxy_mark_that_looks_like_the_tproxy_mark_is_refused(mark: Mark) -> None:
    assert "can't be told from" in problems_of(proxy_mark=mark)[0]


@pytest.mark.parametrize("mark", [Mark(0x10000, 0x10000), Mark(1), Mark(0xF000, 0xF000)], ids=str)
def test_proxy_mark_in_bits_of_its_own_is_allowed(mark: Mark) -> None:
    assert Config(proxy_mark=mark).proxy_mark == mark


def test_interface_cannot_be_virtual_and_excluded() -> None:
    assert problems_of(virtual_interfaces=("docker0",), exclude_interfaces=("docker0",)) == [
        "--virtual-interfaces: 'docker0': is in --exclude-interfaces too"
    ]


def test_loopback_is_no_virtual_interface() -> None:
    assert "loopback" in problems_of(virtual_interfaces=("lo",))[0]


def test_all_contradictions_are_reported_at_once() -> None:
    assert len(problems_of(inbound_port=15001, proxy_uid=(), proxy_gid=(), virtual_interfaces=("lo",))) == 3


@pytest.mark.parametrize("name", ["include_uids", "exclude_uids"])
def test_application_list_with_the_proxys_uid_is_warned_of(name: str) -> None:
    found = warnings(Config(**{name: (IdRange(1000, 2000),)}))  # type: ignore[arg-type]

    assert [FIELD[name].flag in text for text in found] == [True]


def test_family_excluded_names_the_other_family_alone() -> None:
    config = Config(ip_family="v4")

    assert [config.family_excluded(family) for family in (Family.V4, Family.V6)] == [False, True]


def test_cgroup_path_is_taken_without_its_slashes() -> None:
    assert FIELD["proxy_cgroup"].kind.parse("/kubepods/pod1/", NAMES) == "kubepods/pod1"


@pytest.mark.parametrize("text", ['a"b', "a\\b", "../x", "a\nb", "/", " /", "a//b", "a/./b"])
def test_cgroup_path_that_is_none_or_could_break_out_of_nft_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cgroup v2 path"):
        FIELD["proxy_cgroup"].kind.parse(text, NAMES)


@pytest.mark.parametrize(
    "name", ["exclude_inbound_ports", "exclude_outbound_ports", "exclude_inbound_cidrs", "exclude_outbound_cidrs"]
)
def test_excluding_everything_is_refused_with_the_right_option(name: str) -> None:
    with pytest.raises(ValueError, match="--outbound off"):
        FIELD[name].kind.parse("*", NAMES)


@pytest.mark.parametrize("text", ["0", "253", "254", "255", "4294967296", "main", "-1"])
def test_routing_table_of_the_system_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="routing table"):
        FIELD["tproxy_table"].kind.parse(text, NAMES)


def test_equal_values_make_equal_configs() -> None:
    assert Config(exclude_uids=(IdRange(1, 2),)) == Config(exclude_uids=(IdRange(1, 2),))
    assert Config() != Config(include_inbound_ports=(PortRange(80, 80),))


@pytest.mark.parametrize("option", ["upstream_proxy_protocol_ports", "upstream_proxy_protocol_cidrs"])
def test_destinations_for_no_header_are_refused(option: str) -> None:
    value = (PortRange(80, 80),) if option.endswith("ports") else parse_cidrs("10.0.0.0/8")

    assert [problem.partition(":")[0] for problem in problems_of(**{option: value})] == [FIELD[option].flag]


def test_a_header_for_nobody_is_refused() -> None:
    assert "sent to nobody" in problems_of(upstream_proxy_protocol="v2")[0]


def test_an_admin_port_that_is_off_is_equal_to_none() -> None:
    assert Config(admin_port=None).admin_port is None
    assert problems_of(admin_port=15001)[0].endswith("the proxy's ports must differ")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("5s", 5.0), ("250ms", 0.25), ("1.5", 1.5), ("2m", 120.0), ("1h", 3600.0), ("1d", 86400.0), (" 7 ", 7.0)],
)
def test_a_time_has_a_unit_or_is_in_seconds(text: str, seconds: float) -> None:
    assert FIELD["connect_timeout"].kind.parse(text, NAMES) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "off", "5 s", "5x", "nan", "inf", "1e3", "31d", "٣", "0ms"])
def test_what_is_no_time_is_refused(text: str) -> None:
    assert parsed_or_reason(FIELD["connect_timeout"], text).startswith("refused: a time over 0")


@pytest.mark.parametrize(("text", "names"), [("off", ()), ("sni", ("sni",)), ("sni,host,sni", ("host", "sni"))])
def test_names_to_look_for_are_a_set(text: str, names: tuple[str, ...]) -> None:
    assert FIELD["peek"].kind.parse(text, NAMES) == names


@pytest.mark.parametrize("text", ["", "sni,off", "alpn", ","])
def test_what_is_no_name_to_look_for_is_refused(text: str) -> None:
    assert parsed_or_reason(FIELD["peek"], text).startswith("refused: ")


@given(configs())
def test_no_plan_depends_on_what_only_the_proxy_reads(config: Config) -> None:
    defaults = {name: field.default for name, field in ProxyOptions.__dataclass_fields__.items()}

    assert build_plan(config, HostFacts()) == build_plan(dataclasses.replace(config, **defaults), HostFacts())


def test_connect_refuses_a_bypass_that_would_never_end() -> None:
    with pytest.raises(ConfigError, match="--before-proxy"):
        Config(outbound="connect", before_proxy="bypass")
