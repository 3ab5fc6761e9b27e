"""`interceptor demo`: see it work."""

from __future__ import annotations

import click

from interceptor.config import FIELD, Backend
from interceptor.demo.interrupt import Interrupted, tearing_down


@click.command()
@click.option(
    "--requests", "count", type=click.IntRange(1, 1000), default=2, metavar="N", help="Requests over each IP family. [2]"
)
@click.option(
    "--backend", type=click.Choice(FIELD["backend"].kind.choices), default="auto", help="What writes the rules. [auto]"
)
@click.option("--keep", is_flag=True, help="Leave the pods until Ctrl-C, and show the flows of what you do in them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(count: int, backend: Backend, keep: bool, as_json: bool) -> int:
    """Show a captured connection: two pods, a server in one, a client in the other, rules and a proxy in both.

    Everything is made in network namespaces of its own and taken away again. Needs root.
    """
    from interceptor.demo import report, show  # 30 ms

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
                report.keep(demo)
    except Interrupted as interrupted:
        if not (keep and verdict):
            return 128 + interrupted.number
    return 0 if verdict is not None and verdict.is_good else 1
