"""What `run` fixes in a Config, and the ProxySettings that go with it. Pure but for reading resolv.conf."""

from __future__ import annotations

from dataclasses import replace

from interceptor.config import Config
from interceptor.values import Mark

# In the namespace nothing is the proxy's own: it dials from outside. A rule needs some identity, so: a mark nobody sets.
NOBODYS_MARK = Mark(0x69746300)


def run_config(config: Config) -> Config:
    """`config` for the command's namespace: outbound only, and no traffic of the proxy's."""
    return replace(
        config,
        inbound="off",
        original_source=False,
        proxy_uid=(),
        proxy_gid=(),
        proxy_mark=NOBODYS_MARK,
        proxy_cgroup=None,
    )
