"""`interceptor run`: one command, captured."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import click

from interceptor.cli.options import ProxyCommand, common_options, config_options
from interceptor.errors import ConfigError, Problem
from interceptor.sources import Resolved


def _judge(own: Mapping[str, Any], good: Mapping[str, Any]) -> Iterator[Problem]:
    if good.get("outbound") == "off":
        yield Problem("--outbound", "off", "nothing of the command's would get out; redirect or tproxy")
    # Whether --flows can be written shows before anything else happens; it is opened, and emptied, after that.
    path = own["flows"]
    if path is None or path == "-":
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        yield Problem("--flows", path, "a file is wanted, and this is a directory")
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        yield Problem("--flows", path, "a file that can be written; this one, or its directory, can't be")


@click.command(cls=ProxyCommand, context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("--flows", metavar="FILE", help="Write the flows to FILE as JSON lines ('-': standard output); print no table.")
@click.argument("argv", metavar="[--] CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@functools.partial(
    common_options,
    netns="Make the connections from this network namespace, not from our own.",
    json="Print the flows as JSON lines, on stderr.",
)
@functools.partial(config_options, judge=_judge)
def command(resolved: Resolved, netns: str | None, as_json: bool, flows: str | None, argv: tuple[str, ...]) -> int:
    """Run CMD in a network namespace of its own, and capture what it connects to.

    The connections are made from here, so the host needs no rule and no NAT. TCP and DNS get out; other UDP does not, nor does
    what an --exclude option leaves uncaptured. 127.0.0.1 is the namespace's own: the host's local services are out of reach.
    Exit code and signals are CMD's. Its flows are printed on stderr when it has ended.
    """
    from interceptor.run import outside  # the proxy: 30 ms
    from interceptor.table import lines, see

    file = sys.stderr if flows is None else _opened(flows)
    ended = outside.run(argv, resolved, netns)
    seen = [see(json.loads(flow.to_json()), ended.place) for flow in ended.flows]
    try:
        if as_json or flows is not None:
            for one in seen:
                print(json.dumps(one.as_json(), ensure_ascii=False), file=file, flush=True)
        else:
            for line in lines(seen) or ["interceptor: no connection was captured"]:
                print(line, file=file)
    except OSError as error:
        _give_up(file, error)
    return ended.exit_code


def _opened(flows: str) -> TextIO:
    if flows == "-":
        return sys.stdout
    try:
        return open(flows, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem("--flows", flows, error.strerror or str(error))]) from error


def _give_up(file: TextIO, error: OSError) -> None:
    """Go on without `file`, which takes no more: the exit code is the command's all the same."""
    # What stays in its buffer would be written, and fail, once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    if file is not sys.stderr:
        print(f"interceptor: writing {file.name}: {error.strerror}", file=sys.stderr)
