"""`interceptor proxy`: accept captured connections, forward them, and say what was seen."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from interceptor import capture
from interceptor.cli.options import ProxyCommand, common_options, config_options
from interceptor.config import Config
from interceptor.errors import Problem
from interceptor.netns import enter_for_good, locate
from interceptor.proxy import cpus, readiness
from interceptor.proxy.configured import settings as configured
from interceptor.proxy.limits import choose_total, raise_descriptor_limit
from interceptor.proxy.relay.choice import choose
from interceptor.proxy.serve import serve
from interceptor.proxy.settings import ListenFamily, ProxySettings
from interceptor.sources import Resolved, local_names
from interceptor.values import Family, parse_id


def _judge(own: Mapping[str, Any], good: Mapping[str, Any]) -> Iterator[Problem]:
    if all(good.get(name) == "off" for name in ("outbound", "inbound", "dns")):
        yield Problem("--outbound", "off", "with --inbound off and --dns off too there is nothing to listen for")
    try:
        _ids(own["user"] or "root")
    except ValueError as error:
        yield Problem("--user", own["user"], f"{error}; UID or UID:GID, or root")


@click.command(cls=ProxyCommand)
@click.option(
    "--user",
    metavar="UID[:GID]",
    help="Become this user once the ports are open; `root` stays. [the first --proxy-uid and -gid]",
)
@common_options
@functools.partial(config_options, judge=_judge)
def command(resolved: Resolved, netns: str | None, as_json: bool, user: str | None) -> int:
    """Forward captured connections to their original destinations; print one JSON line for each on stdout, as they end.

    Ends on SIGTERM or SIGINT, when the connections have ended or the deadline has passed. The counters are printed then,
    on stderr (with --json as one JSON document).
    """
    settings = _settings(resolved.config, netns, user)
    workers = resolved.config.workers or cpus.available()
    limit = choose_total(settings.max_connections, raise_descriptor_limit(), workers)
    if netns is not None:
        enter_for_good(locate(netns))
    relay = choose(settings.relay, workers, settings.packet_pins)
    settings = dataclasses.replace(settings, max_connections=limit.connections, relay=relay.name)
    names = [str(listener) for listener in settings.listeners]
    names += [f"admin {settings.admin_port}"] if settings.admin_port is not None else []
    said = [
        f"listening: {', '.join(names)}",
        f"workers: {workers}",
        f"relay: {relay.name}: {relay.reason}",
        f"connections a worker: {limit.connections}: {limit.reason}",
    ]
    code, counted = serve(
        settings,
        workers,
        sys.stdout.fileno(),
        lambda: print(f"interceptor: {'; '.join(said)}", file=sys.stderr, flush=True),
        resolved.shown(),
        relay.attached,
    )
    print(json.dumps(counted) if as_json else f"interceptor: {counted}", file=sys.stderr)
    return code


def _settings(config: Config, netns: str | None, user: str | None) -> ProxySettings:
    prepared = capture.prepare(config, netns=netns)
    resolvers = tuple(str(resolver.network_address) for resolver in prepared.facts.resolvers)
    families: tuple[ListenFamily, ...] = tuple("v4" if family is Family.V4 else "v6" for family in prepared.plan.families)
    settings = configured(config, families, resolvers=resolvers, run_as=_identity(config, user))
    if config.outbound == "off" and config.dns == "off":
        return settings
    # Whatever its own --before-proxy says: that of the rules counts, which others may have written.
    own = [str(network.network_address) for network in prepared.facts.own_addresses]
    return dataclasses.replace(settings, announce_to=readiness.addresses(own))


def _identity(config: Config, user: str | None) -> tuple[int, int] | None:
    """(uid, gid) to become; None to stay who we are: not root, or told so."""
    if os.geteuid() != 0 or user in ("root", "0"):
        return None
    if user is not None:
        return _ids(user)
    if not config.proxy_uid:
        return None  # known by its mark or cgroup: any user will do
    return config.proxy_uid[0].first, config.proxy_gid[0].first if config.proxy_gid else config.proxy_uid[0].first


def _ids(user: str) -> tuple[int, int]:
    """(uid, gid) as `user` names them. Raises ValueError."""
    names = local_names()
    uid, colon, gid = user.partition(":")
    number = parse_id(uid, names.uid)
    return number, parse_id(gid, names.gid) if colon else number
