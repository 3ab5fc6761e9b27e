"""`interceptor doctor`: what this kernel and this host can do."""

from __future__ import annotations

import click

from interceptor import doctor
from interceptor.cli.options import ConfiguredCommand, common_options, config_options
from interceptor.cli.output import print_json
from interceptor.errors import Unsupported
from interceptor.sources import Resolved


@click.command(cls=ConfiguredCommand)
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool) -> int:
    """Tell what this kernel and this host can do, and what stands in the way of this configuration.

    Exit 0 when the configuration can be used here, 6 when it cannot. Changes nothing that stays: mechanisms are tried in a
    network namespace that is thrown away. Trying may load kernel modules, as init would. Without root the rest is still told.
    """
    found = doctor.examine(resolved.config, namespace=netns)
    usable = not any(finding.needed and finding.status == "missing" for finding in found)
    if as_json:
        print_json({"usable": usable, "findings": [finding.as_json() for finding in found]})
    else:
        for finding in found:
            print(f"{finding.status:8} {finding.name}: {finding.found}")
            if finding.advice:
                print(f"{'':8} {finding.advice}")
    return 0 if usable else Unsupported.exit_code
