"""`interceptor proxy`: accept captured connections, forward them, and say what was seen."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import click

from interceptor import capture
from interceptor.cli.options import ProxyCommand, common_options, config_options
from interceptor.config import Config
from interceptor.errors import ConfigError, Problem
from interceptor.netns import enter_for_good, locate
from interceptor.proxy.admin import open_admin
from interceptor.proxy.admin_http import AdminHttp
from interceptor.proxy.configured import settings as configured
from interceptor.proxy.flow_log import FlowLog
from interceptor.proxy.limits import Choice, choose_total, raise_descriptor_limit
from interceptor.proxy.metrics import Region, summary
from interceptor.proxy.server import Proxy, open_listeners
from interceptor.proxy.settings import ListenFamily, ProxySettings
from interceptor.proxy.shown import Shown
from interceptor.sources import Resolved
from interceptor.values import Family


@click.command(cls=ProxyCommand)
@click.option(
    "--user",
    metavar="UID[:GID]",
    help="Become this user once the ports are open; `root` stays. [the first --proxy-uid and -gid]",
)
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool, user: str | None) -> int:
    """Forward captured connections to their original destinations; print one JSON line for each on stdout.

    Ends on SIGTERM or SIGINT, when the connections have ended or the deadline has passed. The counters are printed then,
    on stderr (with --json as one JSON document).
    """
    settings = _settings(resolved.config, netns, user)
    descriptors = raise_descriptor_limit()
    limit = choose_total(settings.max_connections, descriptors)
    settings = dataclasses.replace(settings, max_connections=limit.connections)
    if netns is not None:
        enter_for_good(locate(netns))
    listeners = open_listeners(settings)
    region = Region()
    log = FlowLog(sys.stdout.fileno(), region.worker(0))
    proxy = Proxy(settings, listeners, log.write, counts=region.worker(0))
    admin = None
    if settings.admin_port is not None:
        admin = open_admin(settings.admin_port, _families(settings), Shown(proxy, region, resolved.shown()))
    try:
        proxy.run(lambda: _ready(settings, limit, admin))
    finally:
        if admin is not None:
            admin.close()
        log.close()
    shown = summary(region.totals())
    print(json.dumps(shown) if as_json else f"interceptor: {shown}", file=sys.stderr)
    return 0


def _ready(settings: ProxySettings, limit: Choice, admin: AdminHttp | None) -> None:
    if admin is not None:
        admin.start()  # now: what it answers, the proxy's own user answers
    names = ", ".join(str(listener) for listener in settings.listeners)
    where = f"; admin {settings.admin_port}" if admin is not None else ""
    print(
        f"interceptor: listening: {names}{where}; up to {limit.connections} connections: {limit.reason}",
        file=sys.stderr,
        flush=True,
    )


def _families(settings: ProxySettings) -> tuple[ListenFamily, ...]:
    # One that captures nothing still answers whoever asks for its health.
    return tuple(dict.fromkeys(listener.family for listener in settings.listeners)) or ("v4",)


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
