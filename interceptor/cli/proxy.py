"""`interceptor proxy`: accept captured connections, forward them, and say what was seen."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import click

from interceptor import capture
from interceptor.cli.options import ConfiguredCommand, common_options, config_options
from interceptor.config import Config
from interceptor.errors import ConfigError, Problem
from interceptor.netns import enter_for_good, locate
from interceptor.proxy.configured import settings as configured
from interceptor.proxy.flow_log import FlowLog
from interceptor.proxy.server import Proxy, open_listeners
from interceptor.proxy.settings import ListenFamily, ProxySettings
from interceptor.sources import Resolved
from interceptor.values import Family


@click.command(cls=ConfiguredCommand)
@click.option(
    "--user",
    metavar="UID[:GID]",
    help="Become this user once the ports are open; `root` stays. [the first --proxy-uid and -gid]",
)
@click.option("--drain-deadline", type=click.FloatRange(0), default=5.0, metavar="S", help="After SIGTERM, wait this long. [5]")
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool, user: str | None, drain_deadline: float) -> int:
    """Forward captured connections to their original destinations; print one JSON line for each on stdout.

    Ends on SIGTERM or SIGINT, when the connections have ended or the deadline has passed. The counters are printed then,
    on stderr (with --json as one JSON document).
    """
    settings = dataclasses.replace(_settings(resolved.config, netns, user), drain_deadline_s=drain_deadline)
    if netns is not None:
        enter_for_good(locate(netns))
    listeners = open_listeners(settings)
    log = FlowLog(sys.stdout.fileno())
    proxy = Proxy(settings, listeners, lambda flow: log.write(flow.to_json()))
    names = ", ".join(str(listener) for listener in settings.listeners)
    proxy.run(lambda: print(f"interceptor: listening: {names}", file=sys.stderr, flush=True))
    log.close()
    shown = {**proxy.counters.as_json(), "flow_records_lost": log.lost}
    print(json.dumps(shown) if as_json else f"interceptor: {shown}", file=sys.stderr)
    return 0


def _settings(config: Config, netns: str | None, user: str | None) -> ProxySettings:
    prepared = capture.prepare(config, netns=netns)
    resolvers = tuple(str(resolver.network_address) for resolver in prepared.facts.resolvers)
    families: tuple[ListenFamily, ...] = tuple("v4" if family is Family.V4 else "v6" for family in prepared.plan.families)
    return configured(config, families, resolvers=resolvers, run_as=_identity(config, user))


def _identity(config: Config, user: str | None) -> tuple[int, int] | None:
    """(uid, gid) to become; None to stay who we are: not root, or told so."""
    if os.geteuid() != 0 or user in ("root", "0"):
        return None
    if user is not None:
        uid, _, gid = user.partition(":")
        if not (uid.isdigit() and (gid or uid).isdigit()):
            raise ConfigError([Problem("--user", user, "UID or UID:GID, in numbers, or root")])
        return int(uid), int(gid or uid)
    if not config.proxy_uid:
        return None  # known by its mark or cgroup: any user will do
    return config.proxy_uid[0].first, config.proxy_gid[0].first if config.proxy_gid else config.proxy_uid[0].first
