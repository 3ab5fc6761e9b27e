"""The plan as JSON: a form that scripts may rely on."""

from __future__ import annotations

import json

from interceptor.config import Config
from interceptor.plan.build import build_plan
from interceptor.plan.model import Hook, HostFacts, Match, Redirect, Rule, SetConnmark, ShortTimeouts, Table, TimeoutPolicy
from interceptor.render import document
from interceptor.values import IdRange, Mark, PortRange, Proto, parse_cidrs


def test_plan_has_the_documented_keys() -> None:
    found = document.plan(build_plan(Config(outbound="tproxy"), HostFacts()))

    assert list(found) == ["schema", "families", "chains", "routes", "inbound_source_v6", "connect"]
    assert found["schema"] == 1
    assert found["families"] == ["v4", "v6"]
    assert found["routes"][0] == {"family": "v4", "mark": "0x539/0xfff", "table": 133}
    assert {tuple(chain) for chain in found["chains"]} == {("table", "name", "hook", "rules")}
    assert {chain["table"] for chain in found["chains"]} <= {table.value for table in Table}
    assert {chain["hook"] for chain in found["chains"]} <= {None, *(hook.value for hook in Hook)}


def test_rule_shows_the_given_conditions_alone() -> None:
    match = Match(
        proto=Proto.TCP, dports=(PortRange(80, 90),), uids=(IdRange(1, 1),), dst=parse_cidrs("10.0.0.0/8"), mark=Mark(1, 3)
    )

    assert document.rule(Rule(match, Redirect(15001), "why", "--option")) == {
        "match": {"proto": "tcp", "dst": ["10.0.0.0/8"], "dports": ["80-90"], "uids": ["1"], "mark": "0x1/0x3"},
        "verdict": {"kind": "redirect", "port": 15001},
        "why": "why",
        "option": "--option",
    }


def test_verdict_kinds_are_words_with_dashes() -> None:
    assert document.verdict(SetConnmark(Mark(1))) == {"kind": "set-connmark", "mark": "0x1"}
    assert document.verdict(ShortTimeouts(TimeoutPolicy.CAPTURED))["kind"] == "short-timeouts"


def test_whole_document_is_json() -> None:
    plan = build_plan(Config(dns="all", udp="tproxy", inbound="tproxy", log_rules=True, drop_invalid=True), HostFacts())

    assert json.loads(json.dumps(document.plan(plan))) == document.plan(plan)
