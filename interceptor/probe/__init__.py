"""Send real packets down every path that a plan captures, as the right users, and say which rule fails.

`check` compares text with text; this proves what the text does. paths.py says what to try, client.py sends it, listener.py
waits for it where the proxy would, neighbour.py makes another host to send inbound packets from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeAlias

from interceptor import capture, facts, netns
from interceptor.config import Config
from interceptor.errors import InterceptorError
from interceptor.probe import client, listener, neighbour
from interceptor.probe.paths import Path, paths

Status: TypeAlias = Literal["ok", "failed", "not probed"]


# Its packets would leave, as they should; and whether they would be captured afterwards they cannot tell.
NOT_ANNOUNCED = "--before-proxy bypass: it goes direct until the proxy has announced itself; start the proxy first"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one path. `detail` says why it failed or could not be probed; `rule` is the rule that should decide."""

    path: Path
    status: Status
    detail: str
    rule: str


def probe(config: Config, *, netns_name: str | None = None, allow_host: bool = False) -> tuple[Result, ...]:
    """Probe every path that `config` captures, here or in a namespace. Adds an interface for inbound paths, and removes it.

    Needs root for other users' packets and for inbound ones; a path that needs what we do not have is "not probed".
    """
    prepared = capture.prepare(config, netns=netns_name)
    with netns.entered(None if netns_name is None else netns.locate(netns_name)), ExitStack() as stack:
        capture.guard(allow_host)
        wanted = paths(config, prepared.plan, facts.local_addresses())
        beside = (
            stack.enter_context(neighbour.made(prepared.plan.families))
            if any(path.needs_neighbour for path in wanted)
            else None
        )
        waiting = {at: stack.enter_context(listener.at(at)) for at in dict.fromkeys(path.arrives for path in wanted)}
        early = capture.announced(prepared.plan) is False
        results = [
            Result(path, "not probed", NOT_ANNOUNCED, path.rule)
            if early and path.direction in ("outbound", "dns")
            else _result(path, waiting[path.arrives], beside, config.probe_port)
            for path in wanted
        ]
    return tuple(_explained(results, config, netns_name))


def _result(path: Path, waiting: listener.Waiting, beside: neighbour.Neighbour | None, probe_port: int) -> Result:
    rule = path.rule
    if waiting.trouble is not None:
        return Result(path, "not probed", waiting.trouble, rule)
    if not waiting.is_ours and path.port != probe_port:
        detail = f"a program holds port {path.arrives.port} and would pass this on; probe before the proxy starts"
        return Result(path, "not probed", detail, rule)
    if path.needs_neighbour and (beside is None or beside.trouble is not None):
        return Result(path, "not probed", (beside and beside.trouble) or "there is no neighbour", rule)
    answer = client.send(path, beside)
    if answer.refused_privilege:
        return Result(path, "not probed", f"sending as uid {path.uid} needs root", rule)
    if answer.unable:
        return Result(path, "not probed", answer.unable, rule)
    if answer.no_route:
        return Result(path, "not probed", f"no route to {path.destination}", rule)
    if answer.heard == path.expected:
        return Result(path, "ok", "", rule)
    heard = f"it arrived with original destination {answer.heard}" if answer.heard else f"nothing arrived ({answer.error})"
    return Result(path, "failed", heard, rule)


def _explained(results: list[Result], config: Config, netns_name: str | None) -> Iterator[Result]:
    """Failed results with what `check` finds wrong in the kernel, if anything."""
    if not any(result.status == "failed" for result in results):
        yield from results
        return
    try:
        found = _suspects(capture.check(config, netns=netns_name))
    except InterceptorError as error:  # nothing here can read rules; what the packets showed is true all the same
        found = f"the rules cannot be compared: {error}"
    for result in results:
        detail = f"{result.detail}; {found}" if result.status == "failed" else result.detail
        yield Result(result.path, result.status, detail, result.rule)


def _suspects(checked: capture.Checked) -> str:
    if not checked.differences:
        return "the rules are as planned: look at other programs' rules"
    if checked.nothing_there:
        return "no rule of ours is there: run `interceptor init`"
    return "; ".join(str(difference) for difference in checked.differences[:3])
