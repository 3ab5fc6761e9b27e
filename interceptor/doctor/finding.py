"""What doctor finds: data, and how it is shown. Knows nothing of where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warn", "missing", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `found` says what is there, `advice` what it means and what to do; "" when there is nothing to do.

    missing: something that capture or the proxy may need is not there. warn: works, and may hurt. unknown: could not be looked
    at, `found` says why. `needed`: the configuration that was given cannot do without.
    """

    area: Literal["kernel", "rules", "bpf", "host", "namespace"]
    name: str
    status: Status
    found: str
    advice: str = ""
    needed: bool = False
    by_backend: Mapping[str, str] = field(default_factory=dict)  # backend -> why not; "" when it works

    def as_json(self) -> dict[str, object]:
        """All of it, for --json."""
        shown = ("area", "name", "status", "found", "advice", "needed")
        return {**{name: getattr(self, name) for name in shown}, "by_backend": dict(self.by_backend)}
