"""What to do for one pod: capture it, with which options, or leave it alone, and why. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from cni.entry import Entry
from cni.protocol import Request
from interceptor import sources
from interceptor.config import Config, Names

# CNI_ARGS can carry options without Kubernetes (`podman run --annotation`, ctr): named as their environment variables are.
ARGS_PREFIX = sources.ENV_PREFIX


@dataclass(frozen=True, slots=True)
class Capture:
    """Capture the pod. `resolvers`: the name servers of the pod's coming resolv.conf; None where nobody told."""

    config: Config
    resolvers: tuple[str, ...] | None = None
    reason: str = "the conflist's entry says so"


@dataclass(frozen=True, slots=True)
class Skip:
    """Leave the pod alone."""

    reason: str


Decision: TypeAlias = Capture | Skip


def decide(request: Request, entry: Entry) -> Decision:
    """Without Kubernetes: the conflist, over it the runtime's wish for this pod, over both CNI_ARGS. Raises ConfigError."""
    resolved = sources.resolve(
        objects=(
            sources.from_object(entry.capture, "capture"),
            sources.from_object(entry.runtime_capture, "runtimeConfig.interceptor"),
        ),
        environment={name: value for name, value in request.args.items() if name.startswith(ARGS_PREFIX)},
        names=Names(_no_name, _no_name),
    )
    config = resolved.config
    if config.outbound == config.inbound == config.udp == config.dns == "off":
        return Skip("outbound, inbound, udp and dns are off")
    return Capture(config, entry.resolvers)


def _no_name(name: str) -> int:
    # The host's users are not the pod's.
    raise KeyError(name)
