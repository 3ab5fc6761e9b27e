"""`interceptor config`: every option's value and where it came from."""

from __future__ import annotations

import click

from interceptor import netns as namespaces
from interceptor.cli.options import ConfiguredCommand, common_options, config_options
from interceptor.cli.output import print_json, print_table
from interceptor.sources import Resolved


@click.command(cls=ConfiguredCommand)
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool) -> int:
    """Show every option's value and where it came from."""
    if netns is not None:
        # Options do not depend on it; that it is there is all that can be said.
        namespaces.require(namespaces.locate(netns))
    shown = resolved.shown()
    if as_json:
        print_json(shown)
    else:
        lines = [(name, one["value"] or "-", one["origin"]) for name, one in shown.items()]
        print_table([("OPTION", "VALUE", "FROM"), *lines])
    return 0
