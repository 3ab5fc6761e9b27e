"""`interceptor explain`: what becomes of one packet, and by which rule. Walks the plan; the kernel is not asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import click

from interceptor import capture
from interceptor.cli import packet
from interceptor.cli.options import ConfiguredCommand, NotingOption, common_options, config_options
from interceptor.cli.output import print_json
from interceptor.errors import Problem
from interceptor.plan.walk import Outcome, Packet, Step, walk
from interceptor.render.document import verdict
from interceptor.sources import Resolved


def _judge(own: Mapping[str, Any], _good: Mapping[str, Any]) -> Iterable[Problem]:
    return packet.read(own)[1]


@click.command(cls=ConfiguredCommand)
@click.option(
    "--proto", cls=NotingOption, type=click.Choice(("tcp", "udp")), default="tcp", show_default=True, help="Transport protocol."
)
@click.option("--src", metavar="ADDRESS", help="Source.  [an address of this host; a stranger's with --in-interface]")
@click.option("--dst", metavar="ADDRESS", help="Destination.  [an address of this host with --in-interface; else required]")
@click.option("--dport", metavar="PORT", default="80", show_default=True, help="Destination port.")
@click.option("--uid", metavar="USER", help="The sending process's user.  [yours]")
@click.option("--gid", metavar="GROUP", help="Its group.  [the same number as --uid]")
@click.option("--in-interface", metavar="NAME", help="The packet comes in here; without, a local process sends it.")
@click.option("--out-interface", metavar="NAME", help="It goes out here.  [lo to an address of this host, else eth0]")
@click.option("--mark", metavar="MARK", default="0", show_default=True, help="The socket's or packet's mark.")
@click.option("--early", is_flag=True, help="With --before-proxy bypass: before the proxy has announced itself.")
@click.option("-v", "--verbose", is_flag=True, help="Show every rule that it met.")
@common_options
@functools.partial(config_options, judge=_judge)
def command(resolved: Resolved, netns: str | None, as_json: bool, early: bool, verbose: bool, **asked: str | None) -> int:
    """Say what becomes of a connection: captured, direct or dropped, and the rule and option behind it."""
    said, _ = packet.read(asked)
    assert said is not None  # else _judge has refused it
    met = dataclasses.replace(packet.packet_from(said, netns), announced=not early)
    outcome = walk(capture.prepare(resolved.config, netns=netns).plan, met)
    if as_json:
        print_json(_document(met, outcome))
    else:
        print(f"{outcome.fate}: {outcome.mechanism} to the proxy's port {outcome.port}" if outcome.port else outcome.fate)
        print(f"  packet  {packet.describe(met)}")
        rows = _shown(outcome.deciding) if outcome.deciding else {"why": "no rule of the plan concerns it"}
        print("\n".join(f"  {name:<7} {text}" for name, text in rows.items()))
        for step in outcome.steps if verbose else ():
            print(f"  - {step.chain.table.value} {step.chain.name}: {step.rule.why}: {_verdict(step)} ({step.rule.option})")
    return 0


def _shown(step: Step) -> dict[str, str]:
    return {"why": step.rule.why, "option": step.rule.option, "chain": f"{step.chain.table.value} {step.chain.name}"}


def _verdict(step: Step) -> str:
    return " ".join(str(value) for value in verdict(step.rule.verdict).values())


def _document(met: Packet, outcome: Outcome) -> dict[str, Any]:
    found = {"fate": outcome.fate, "mechanism": outcome.mechanism, "port": outcome.port, "packet": packet.describe(met)}
    trail = [_shown(step) | {"verdict": verdict(step.rule.verdict)} for step in outcome.steps]
    return found | {"deciding": _shown(outcome.deciding) if outcome.deciding else None, "trail": trail}
