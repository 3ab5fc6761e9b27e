"""A running proxy as the admin port shows it: one process, or several under a supervisor. Adds nothing of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from interceptor.proxy import open_flows
from interceptor.proxy.admin import State
from interceptor.proxy.metrics import Region
from interceptor.proxy.server import Proxy
from interceptor.proxy.workers import Supervisor


@dataclass(frozen=True, slots=True)
class Shown:
    """See admin.Administered. `options`: option -> value and origin."""

    serving: Proxy | Supervisor
    region: Region
    options: Mapping[str, Any]

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self.serving.state

    def totals(self) -> list[int]:
        """All workers' counts."""
        return self.region.totals()

    def workers(self) -> Mapping[int, int]:
        """Number -> pid."""
        return self.serving.pids() if isinstance(self.serving, Supervisor) else {}

    def open_flows(self) -> Iterable[Mapping[str, Any]]:
        """The open connections."""
        if isinstance(self.serving, Supervisor):
            return open_flows.ask(self.serving.asking())
        return self._own_flows(self.serving)

    def config(self) -> Mapping[str, Any]:
        """The options."""
        return self.options

    def drain(self) -> None:
        """Begin to drain; a second time changes nothing, unlike a second signal."""
        if isinstance(self.serving, Supervisor):
            self.serving.drain()
        elif self.serving.state != "draining":
            self.serving.stop()

    def _own_flows(self, proxy: Proxy) -> Iterator[Mapping[str, Any]]:
        return (json.loads(flow.to_json()) for flow in proxy.open_flows())
