"""`interceptor doctor`: what this kernel and this host can do, and what stands in the way. Changes nothing that stays."""

from __future__ import annotations

from interceptor import netns
from interceptor.config import Config
from interceptor.doctor import bpf, host, mechanisms
from interceptor.doctor.finding import Finding

__all__ = ["Finding", "examine"]


def examine(config: Config, *, namespace: str | None = None) -> list[Finding]:
    """All findings for `config`; of `namespace` (None: where we are) what belongs to a namespace. Raises NetnsError."""
    with netns.entered(None if namespace is None else netns.locate(namespace)):
        seen = list(host.findings(config))
    return [*seen, *mechanisms.findings(config), *bpf.findings()]
