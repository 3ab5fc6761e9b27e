"""`interceptor init`: write the capture rules."""

from __future__ import annotations

import click

from interceptor import capture
from interceptor.cli.options import ConfiguredCommand, common_options, config_options
from interceptor.cli.output import print_json, print_warnings
from interceptor.sources import Resolved


@click.command(cls=ConfiguredCommand)
@click.option("--host", is_flag=True, help="Allow it in the host's own network namespace.")
@click.option("--dry-run", is_flag=True, help="Only print the plan, like `interceptor plan`.")
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool, host: bool, dry_run: bool) -> int:
    """Write the capture rules. A second call with the same options changes nothing."""
    if dry_run:
        from interceptor.cli.plan import print_plan

        print_plan(resolved.config, netns, "json" if as_json else None)
        return 0
    report = capture.enable(resolved.config, netns=netns, allow_host=host)
    said = [*report.warnings, *capture.going_around(resolved.config, netns=netns)]
    print_warnings(said)
    if as_json:
        shown = ("changed", "backend", "reason", "removed")
        print_json({**{name: getattr(report, name) for name in shown}, "warnings": said})
        return 0
    families = " and ".join(f"IP{family.value}" for family in report.plan.families)
    print(f"{'capturing' if report.changed else 'unchanged: capturing'} {families} with {report.backend} ({report.reason})")
    for other in report.removed:
        print(f"removed the rules that {other} held")
    return 0
