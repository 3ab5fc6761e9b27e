"""`interceptor plan`: what init would do, as text. Changes nothing, needs no root."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import click

from interceptor import capture
from interceptor.cli.options import ConfiguredCommand, NotingOption, common_options, config_options
from interceptor.cli.output import print_json
from interceptor.config import Config
from interceptor.errors import Problem
from interceptor.plan.model import TIMEOUTS, Plan, timeout_name
from interceptor.render import connect_policy, document, iptables, nft
from interceptor.sources import Resolved
from interceptor.values import Family

FORMATS = ("nft", "iptables", "json")


def _judge(own: Mapping[str, Any], good: Mapping[str, Any]) -> Iterator[Problem]:
    if own["form"] == "iptables" and good.get("proxy_cgroup"):
        yield Problem("--format", "iptables", "iptables rules match no cgroup, and --proxy-cgroup is given")
    if own["as_json"] and own["form"] not in (None, "json"):
        yield Problem("--format", own["form"], "is not what --json prints; give one of the two")


@click.command(cls=ConfiguredCommand)
@click.option(
    "--format",
    "form",
    cls=NotingOption,
    type=click.Choice(FORMATS),
    help="As what to print it.  [what --backend takes; nft for auto]",
)
@common_options
@functools.partial(config_options, judge=_judge)
def command(resolved: Resolved, netns: str | None, as_json: bool, form: str | None) -> int:
    """Print what init would do. Needs no root and changes nothing."""
    print_plan(resolved.config, netns, "json" if as_json else form)
    return 0


def print_plan(config: Config, netns: str | None, form: str | None) -> None:
    """Print the plan for `config` in this form; None for the one that its backend reads."""
    plan = capture.prepare(config, netns=netns).plan
    if form == "json":
        print_json(document.plan(plan))
        return
    if form == "nft" or (form is None and config.backend in ("auto", "nft")):
        text = nft.script(plan)
    else:
        text = "".join(_restore(plan, family) for family in Family)
    print("\n".join((*_surroundings(plan), text)), end="")


def _restore(plan: Plan, family: Family) -> str:
    text = iptables.restore(iptables.rules(plan, family), {})
    if not text:
        return ""
    timeouts = "".join(
        f"# conntrack timeout policy {timeout_name(policy, family)}: "
        + ", ".join(f"{state} {seconds} s" for state, seconds in TIMEOUTS[policy].items())
        + "\n"
        for policy in plan.timeout_policies
    )
    return f"# IP{family.value}\n{timeouts}{text}"


def _surroundings(plan: Plan) -> Iterator[str]:
    if plan.connect is not None:
        yield from (f"# {line}" for line in connect_policy.document(plan.connect).splitlines())
    for route in plan.routes:
        yield f"# policy route: {route}"
    if plan.inbound_source_v6:
        yield "# address on lo: ::6/128"
