"""Which marks of an earlier init keep their rules."""

from __future__ import annotations

import pytest

from interceptor.config import Config
from interceptor.plan.build import build_plan
from interceptor.plan.established import kept
from interceptor.plan.model import HostFacts, PolicyRoute, Table
from interceptor.values import Family, Mark

OWN = Mark(0x539, 0xFFF)


@pytest.mark.parametrize(
    ("earlier", "is_kept"),
    [
        pytest.param(Mark(0x539, 0xFFF), True, id="the same"),
        pytest.param(Mark(0x400, 0xFFF), True, id="far"),
        pytest.param(Mark(0x53A, 0xFFF), False, id="one more"),
        pytest.param(Mark(0x537, 0xFFF), False, id="two less"),
        pytest.param(Mark(0x53C, 0xFFF), True, id="next triple"),
        pytest.param(Mark(0x53A0000, 0xFFF0000), True, id="other bits"),
    ],
)
def test_a_mark_that_could_be_taken_for_another_is_given_up(earlier: Mark, is_kept: bool) -> None:
    route = PolicyRoute(Family.V4, earlier, 133)

    assert kept(OWN, [route]) == ((route,) if is_kept else ())


def test_each_mark_has_its_rules_in_the_families_that_have_its_route() -> None:
    earlier = (PolicyRoute(Family.V4, OWN, 133), PolicyRoute(Family.V6, OWN, 133), PolicyRoute(Family.V6, Mark(0x20, 0xFF), 7))
    plan = build_plan(Config(), HostFacts(earlier_routes=earlier))
    families = [rule.match.family for chain in plan.chains if chain.table is Table.MANGLE for rule in chain.rules]

    assert set(plan.routes) == set(earlier)
    assert families.count(None) == families.count(Family.V6) == 5
    assert len(families) == 10
