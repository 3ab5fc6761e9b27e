"""`interceptor announce`: tell the capture rules that a proxy is ready, for proxies that do not do it themselves."""

from __future__ import annotations

import os

import click

from interceptor import capture
from interceptor.cli.options import ConfiguredCommand, common_options, config_options
from interceptor.cli.output import print_json
from interceptor.config import Config
from interceptor.netns import enter_for_good, locate
from interceptor.proxy.identity import CAP_NET_ADMIN, become
from interceptor.proxy.readiness import addresses, announce
from interceptor.sources import Resolved


@click.command(cls=ConfiguredCommand)
@common_options
@config_options
def command(resolved: Resolved, netns: str | None, as_json: bool) -> int:
    """Tell the rules of --before-proxy bypass that the proxy is ready: outbound traffic is captured from now on.

    `interceptor proxy` does so by itself; this is for others, in a postStart hook for example. As root it becomes the first
    --proxy-uid and -gid; anybody else must be the proxy's user already, or the rules do not listen.
    """
    config = resolved.config
    own = [str(network.network_address) for network in capture.prepare(config, netns=netns).facts.own_addresses]
    if netns is not None:
        enter_for_good(locate(netns))
    _become_proxy(config)
    taken = announce(addresses(own), config.probe_port, config.proxy_mark.value if config.proxy_mark else None)
    if as_json:
        print_json({"taken": taken})
    elif taken:
        print("announced: outbound traffic is captured from now on")
    else:
        print(f"no rule here waits for a proxy of uid {os.getuid()}, gid {os.getgid()}: nothing has changed")
    return 0


def _become_proxy(config: Config) -> None:
    if os.geteuid() != 0 or not (config.proxy_uid or config.proxy_gid):
        return  # known by a mark or a cgroup: any user will do
    uid = config.proxy_uid[0].first if config.proxy_uid else 0
    gid = config.proxy_gid[0].first if config.proxy_gid else os.getgid()
    become(uid, gid, frozenset({CAP_NET_ADMIN} if config.proxy_mark else ()))
