"""One running proxy as the admin port shows it. Adds nothing of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from interceptor.proxy.admin import State
from interceptor.proxy.metrics import Region
from interceptor.proxy.server import Proxy


@dataclass(frozen=True, slots=True)
class Shown:
    """See admin.Administered. `options`: option -> value and origin."""

    proxy: Proxy
    region: Region
    options: Mapping[str, Any]

    @property
    def state(self) -> State:
        """Where the proxy is in its life."""
        return self.proxy.state

    def totals(self) -> list[int]:
        """All workers' counts."""
        return self.region.totals()

    def open_flows(self) -> Iterator[Mapping[str, Any]]:
        """The open connections."""
        return (json.loads(flow.to_json()) for flow in self.proxy.open_flows())

    def config(self) -> Mapping[str, Any]:
        """The options."""
        return self.options

    def drain(self) -> None:
        """Begin to drain; a second time changes nothing, unlike a second signal."""
        if self.proxy.state != "draining":
            self.proxy.stop()
