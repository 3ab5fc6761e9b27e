"""`interceptor demo`: see it work."""

from __future__ import annotations

import functools

import click

from interceptor import netns as namespaces
from interceptor.cli.options import NotingOption, common_options, refuse_noted
from interceptor.config import FIELD, Backend
from interceptor.demo.interrupt import Interrupted, tearing_down


@click.command()
@click.option(
    "--requests",
    "count",
    cls=NotingOption,
    type=click.IntRange(1, 1000),
    default=2,
    metavar="N",
    help="Requests over each IP family. [2]",
)
@click.option(
    "--backend",
    cls=NotingOption,
    type=click.Choice(FIELD["backend"].kind.choices),
    default="auto",
    help="What writes the rules. [auto]",
)
@click.option("--keep", is_flag=True, help="Leave the pods until Ctrl-C, and show the flows of what you do in them.")
@functools.partial(
    common_options,
    netns="Make the pods from in there: nothing is done in our own network namespace.",
    json="Print one JSON document; with --keep, each flow after it as one more line.",
)
def command(netns: str | None, count: int, backend: Backend, keep: bool, as_json: bool) -> int:
    """Show a captured connection: two pods, a server in one, a client in the other, rules and a proxy in both.

    Everything is made in network namespaces of its own and taken away again. Needs root.
    """
    refuse_noted()
    from interceptor.demo import report, show  # 30 ms

    if netns is not None:
        namespaces.enter_for_good(namespaces.locate(netns))
    demo = show.Demo(backend)
    verdict = None
    try:
        with tearing_down(demo.tear_down):
            demo.build()
            demo.make_requests(count)
            verdict = demo.verdict()
            if as_json:
                report.print_json(demo, verdict)
            else:
                report.print_text(demo, verdict)
            if keep:
                report.keep(demo, report.json_line if as_json else report.table_row)
    except Interrupted as interrupted:
        if not (keep and verdict):
            return 128 + interrupted.number
    return 0 if verdict is not None and verdict.is_good else 1
