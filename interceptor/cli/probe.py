"""`interceptor probe`: send real packets down every captured path."""

from __future__ import annotations

import sys

import click

from interceptor.cli.options import ConfiguredCommand, common_options, config_options
from interceptor.cli.output import print_json, print_table
from interceptor.probe import Result, probe
from interceptor.sources import Resolved

FAILED = 126  # istio-iptables' ValidationErrorCode: its repair controller keys on it


@click.command(cls=ConfiguredCommand)
@click.option("--host", is_flag=True, help="Allow it in the host's own network namespace.")
@click.option("--strict", is_flag=True, help="A path that could not be probed is a failure, too.")
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool, strict: bool, host: bool) -> int:
    """Send real packets down every captured path, as the right users; exit 126 when one does not arrive.

    Listens on the proxy's ports, or asks the running proxy. Packets go to documentation addresses, unless the include lists
    leave out all of them. Needs root for other users' packets, and a route for each family.
    """
    results = probe(resolved.config, netns_name=netns, allow_host=host)
    if as_json:
        print_json([_document(result) for result in results])
    else:
        print_table([("STATUS", "PATH", "RULE"), *((result.status, str(result.path), result.rule) for result in results)])
    for result in results if not as_json else ():
        if result.detail:
            print(f"interceptor: {result.status}: {result.path}: {result.detail}", file=sys.stderr)
    if not results:
        print("interceptor: these options capture nothing: there is no path to probe", file=sys.stderr)
        return 0
    bad = {"failed", "not probed"} if strict or all(result.status == "not probed" for result in results) else {"failed"}
    return FAILED if any(result.status in bad for result in results) else 0


def _document(result: Result) -> dict[str, str]:
    path = result.path
    return {
        "status": result.status,
        "direction": path.direction,
        "protocol": path.proto.value,
        "family": path.family.value,
        "destination": path.expected,
        "uid": str(path.uid),
        "rule": result.rule,
        "detail": result.detail,
    }
