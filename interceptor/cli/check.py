"""`interceptor check`: compare the kernel with the plan."""

from __future__ import annotations

import click

from interceptor import capture
from interceptor.cli.options import ConfiguredCommand, common_options, config_options
from interceptor.cli.output import print_json
from interceptor.sources import Resolved

DRIFTED = 3  # docs/exit-codes.md
STATES = {
    True: "the proxy has announced itself: outbound traffic is captured",
    False: "the proxy has not announced itself yet: outbound traffic goes direct",
}


@click.command(cls=ConfiguredCommand)
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool) -> int:
    """Compare the kernel with the plan: exit 0 when equal, 3 when not, naming each difference."""
    checked = capture.check(resolved.config, netns=netns)
    if as_json:
        print_json(
            {
                "equal": not checked.differences,
                "backend": checked.backend,
                "reason": checked.reason,
                "announced": checked.announced,
                "differences": [{"kind": item.kind, "where": item.where, "rule": item.rule} for item in checked.differences],
            }
        )
    else:
        for difference in checked.differences:
            print(difference)
        if not checked.differences:
            print(f"equal: {checked.backend} ({checked.reason})")
        if checked.announced is not None:
            print(STATES[checked.announced])
    return DRIFTED if checked.differences else 0
