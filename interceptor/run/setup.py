"""What `run` fixes in a Config, and the ProxySettings that go with it. Pure."""

from __future__ import annotations

from dataclasses import replace

from interceptor.config import Config
from interceptor.errors import Unsupported
from interceptor.plan.model import HostFacts, Plan
from interceptor.proxy.configured import settings as configured
from interceptor.proxy.settings import ListenFamily, ProxySettings
from interceptor.sources import Resolved
from interceptor.values import Family, Mark

# In the namespace nothing is the proxy's own: it dials from outside. A rule needs some identity, so: a mark nobody sets.
NOBODYS_MARK = Mark(0x69746300)
OPEN_FILES_MIN = 64  # listeners of two families, their copies, pipes, netlink: half of it, without a connection


def run_config(resolved: Resolved) -> Config:
    """The Config for the command's namespace: outbound only, DNS unless told otherwise, and no traffic of the proxy's."""
    config = resolved.config
    return replace(
        config,
        dns="all" if resolved.origin["dns"] == "default" else config.dns,
        inbound="off",
        before_proxy="block",  # the proxy is there first, and what goes direct goes nowhere
        original_source=False,
        proxy_uid=(),
        proxy_gid=(),
        proxy_mark=NOBODYS_MARK,
        proxy_cgroup=None,
    )


def proxy_settings(config: Config, plan: Plan, facts: HostFacts) -> ProxySettings:
    """The proxy's half of `config`: it listens inside, and asks the host's own resolvers from outside."""
    families: tuple[ListenFamily, ...] = tuple("v4" if family is Family.V4 else "v6" for family in plan.families)
    resolvers = tuple(str(resolver.network_address) for resolver in facts.resolvers)
    # What it dials leaves by the host's namespace, where nobody looks for the mark.
    return replace(configured(config, families, resolvers=resolvers), upstream_mark=None)


def check_privilege(config: Config, uid: int, open_files: int) -> None:
    """Raises Unsupported for what only root can do, or what cannot be done with so few `open_files` (ulimit -n)."""
    if open_files < OPEN_FILES_MIN:
        raise Unsupported(
            f"`run` needs {OPEN_FILES_MIN} open files, and two more for each connection; {open_files} are allowed (ulimit -n)"
        )
    if config.udp != "off" and uid != 0:
        raise Unsupported("--udp with `run` needs root: answers are sent from sockets inside the command's network namespace")
