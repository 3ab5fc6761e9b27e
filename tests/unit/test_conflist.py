"""Our entry goes into a conflist and out again, and every other byte stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.install import conflist
from cni.install.conflist import ConflistError, as_list, has_entry, validate, with_entry, without_entry

ENTRY = {"type": "interceptor-cni", "capture": {"proxy_uid": 1337}, "capabilities": {"dns": True}}
CALICO = """{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "mtu": 1.50e3, "policy": {"type": "k8s"}
    },
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}
  ] ,
  "vendor": [1.0, "\\u00fc", {"plugins": []}]
}
"""
ONE_LINE = '{"plugins":[{"type":"ptp"}],"name":"n","cniVersion":"1.0.0"}'
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
plugins = st.lists(
    st.dictionaries(st.text(max_size=6), values, max_size=3).map(lambda keys: {**keys, "type": "vendor"}),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("text", [CALICO, ONE_LINE, f"\n {ONE_LINE} \n"])
def test_what_goes_in_comes_out_byte_for_byte(text: str) -> None:
    edited = with_entry(text, ENTRY)
    assert validate(edited)["plugins"] == [*validate(text)["plugins"], ENTRY]
    assert without_entry(edited) == text


def test_the_text_around_stays_as_it_was_written() -> None:
    edited = with_entry(CALICO, ENTRY)
    start = CALICO.index("  ] ,")
    assert edited.startswith(CALICO[: start - 1])
    assert edited.endswith(CALICO[start - 1 :])
    assert '    {\n      "type": "interceptor-cni",\n' in edited


@given(st.dictionaries(st.text(max_size=5), values, max_size=3), plugins, st.sampled_from([None, 1, 2, "\t"]), st.booleans())
def test_any_list_is_given_back(others: dict[str, Any], listed: list[Any], indent: Any, escaped: bool) -> None:
    whole = {**others, "name": "net", "plugins": listed}
    text = json.dumps(whole, indent=indent, ensure_ascii=escaped)
    edited = with_entry(text, ENTRY)
    assert json.loads(edited) == {**whole, "plugins": [*listed, ENTRY]}
    assert has_entry(edited, ENTRY)
    assert without_entry(edited) == text


def test_putting_it_in_twice_is_once() -> None:
    edited = with_entry(CALICO, ENTRY)
    assert with_entry(edited, ENTRY) == edited


def test_another_entry_of_ours_is_replaced_and_moved_to_the_end() -> None:
    old = {"type": "interceptor-cni", "capture": {}}
    text = json.dumps({"name": "n", "plugins": [old, {"type": "ptp"}, old, {"type": "portmap"}]})
    types = [plugin["type"] for plugin in validate(with_entry(text, ENTRY))["plugins"]]
    assert types == ["ptp", "portmap", "interceptor-cni"]
    assert validate(with_entry(text, ENTRY))["plugins"][-1] == ENTRY


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "{}", "[" * 9999),
        *('{"name": "n"}', '{"name": "", "plugins": [{"type": "x"}]}', '{"name": "n", "plugins": []}'),
        *('{"name": "n", "plugins": {}}', '{"name": "n", "plugins": [{}]}', '{"name": "n", "plugins": [{"type": ""}]}'),
    ],
    ids=lambda text: text[:30],
)
def test_what_no_runtime_loads_is_refused(text: str) -> None:
    with pytest.raises(ConflistError):
        with_entry(text, ENTRY)


def test_a_list_of_nothing_but_ours_is_not_emptied() -> None:
    with pytest.raises(ConflistError):
        without_entry(json.dumps({"name": "n", "plugins": [ENTRY]}))


def test_a_single_configuration_becomes_a_list_that_says_where_it_is_from() -> None:
    single = {"cniVersion": "0.4.0", "name": "n", "type": "bridge", "ipam": {"type": "host-local"}}
    made = validate(as_list(json.dumps(single), ENTRY, "10-bridge.conf"))
    assert made["plugins"] == [{"type": "bridge", "ipam": {"type": "host-local"}}, ENTRY]
    assert (made["cniVersion"], made["name"], made[conflist.ORIGIN_KEY]) == ("0.4.0", "n", "10-bridge.conf")


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "n"}', '{"type": "bridge"}'])
def test_a_single_configuration_must_be_one(text: str) -> None:
    with pytest.raises(ConflistError):
        as_list(text, ENTRY, "x")
