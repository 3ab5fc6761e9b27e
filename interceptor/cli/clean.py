"""`interceptor clean`: take all that is ours away."""

from __future__ import annotations

import click

from interceptor import capture
from interceptor.cli.options import common_options
from interceptor.cli.output import print_json, print_warnings


@click.command()
@click.option("--host", is_flag=True, help="Allow it in the host's own network namespace.")
@common_options
def command(netns: str | None, as_json: bool, host: bool) -> int:
    """Remove all rules, routes and addresses that init wrote. Needs none of init's options."""
    removed = capture.disable(netns=netns, allow_host=host)
    print_warnings(removed.warnings)
    if as_json:
        print_json({"changed": removed.changed, "backends": removed.backends, "warnings": removed.warnings})
    elif removed.changed:
        print(f"removed{': ' if removed.backends else ''}{', '.join(removed.backends)}")
    else:
        print("nothing to remove")
    return 0
