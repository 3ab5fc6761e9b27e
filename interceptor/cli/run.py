"""`interceptor run`: one command, captured."""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

import click

from interceptor.cli.options import ProxyCommand, config_options
from interceptor.sources import Resolved


@click.command(cls=ProxyCommand, context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("--json", "as_json", is_flag=True, help="Print the flows as JSON lines, on stderr.")
@click.option(
    "--flows", type=click.File("w", lazy=False), metavar="FILE", help="Write the flows to FILE as JSON lines; print no table."
)
@click.argument("argv", metavar="[--] CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@config_options
def command(resolved: Resolved, as_json: bool, flows: TextIO | None, argv: tuple[str, ...]) -> int:
    """Run CMD in a network namespace of its own, and capture what it connects to.

    The connections are made from here, so the host needs no rule and no NAT. TCP and DNS get out; other UDP does not, nor does
    what an --exclude option leaves uncaptured. 127.0.0.1 is the namespace's own: the host's local services are out of reach.
    Exit code and signals are CMD's. Its flows are printed on stderr when it has ended.
    """
    from interceptor.run import outside  # the proxy: 30 ms
    from interceptor.table import lines, see

    ended = outside.run(argv, resolved)
    if ended.message:
        print(f"interceptor: {ended.message}", file=sys.stderr)
        return ended.exit_code
    seen = [see(json.loads(flow.to_json()), ended.place) for flow in ended.flows]
    try:
        if as_json or flows is not None:
            for one in seen:
                print(json.dumps(one.as_json(), ensure_ascii=False), file=flows or sys.stderr, flush=True)
        else:
            for line in lines(seen) or ["interceptor: no connection was captured"]:
                print(line, file=sys.stderr)
    except OSError as error:
        _give_up(flows or sys.stderr, error)
    return ended.exit_code


def _give_up(file: TextIO, error: OSError) -> None:
    """Go on without `file`, which takes no more: the exit code is the command's all the same."""
    # What stays in its buffer would be written, and fail, once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    if file is not sys.stderr:
        print(f"interceptor: writing {file.name}: {error.strerror}", file=sys.stderr)
