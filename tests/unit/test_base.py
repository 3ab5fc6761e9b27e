"""How two rule lists are compared: by what an operator would call missing, extra, changed or reordered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.backends.base import Difference, Observed, compare

rule_lists = st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from("uvwxyz"), max_size=6).map(tuple))


def found(wanted: dict[str, tuple[str, ...]], present: dict[str, tuple[str, ...]]) -> list[str]:
    return [str(difference) for difference in compare(Observed(wanted), Observed(present))]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        pytest.param(("a", "b", "c"), [], id="equal"),
        pytest.param(("a", "c"), ["missing: chain: b"], id="missing"),
        pytest.param(("a", "b", "x", "c"), ["extra: chain: x"], id="extra"),
        pytest.param(("a", "x", "c"), ["changed: chain: x (should be: b)"], id="changed"),
        pytest.param(("b", "a", "c"), ["reordered: chain: a", "reordered: chain: b"], id="reordered"),
        pytest.param((), ["missing: chain: a", "missing: chain: b", "missing: chain: c"], id="empty"),
    ],
)
def test_difference_is_called_by_its_name(present: tuple[str, ...], expected: list[str]) -> None:
    assert found({"chain": ("a", "b", "c")}, {"chain": present}) == expected


def test_missing_chain_is_named_with_its_rules() -> None:
    assert found({"chain": ("a",)}, {}) == ["missing: chain: the whole chain", "missing: chain: a"]


def test_extra_chain_is_named_with_its_rules() -> None:
    assert found({}, {"chain": ("a",)}) == ["extra: chain: the whole chain", "extra: chain: a"]


@given(rule_lists, rule_lists)
def test_there_are_differences_exactly_when_the_lists_differ(
    wanted: dict[str, tuple[str, ...]], present: dict[str, tuple[str, ...]]
) -> None:
    assert (compare(Observed(wanted), Observed(present)) == ()) == (wanted == present)


def test_difference_is_a_value() -> None:
    assert compare(Observed({"a": ("x",)}), Observed({"a": ()})) == (Difference("missing", "a", "x"),)
