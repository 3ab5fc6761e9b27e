"""Our entry in the conflist, as typed values. Pure; what the options of `capture` mean is interceptor's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from cni.protocol import INVALID_CONFIG, CniError, JsonObject

OnFailure: TypeAlias = Literal["block", "bypass"]

# The specification's own keys (section 1, "Plugin configuration objects"; section 2, "Deriving execution configuration").
SPECIFIED = frozenset(
    {"cniVersion", "name", "type", "capabilities", "runtimeConfig", "args", "ipam", "dns", "ipMasq", "prevResult"}
)
OURS = frozenset({"capture", "agentSocket", "kubernetes", "onFailure"})
# What chained plugins are given beside that, by libcni and by runtimes.
RESERVED_PREFIX = "cni.dev/"
CAPABILITY = "interceptor"


@dataclass(frozen=True, slots=True)
class Entry:
    """capture: options by name, before they are parsed. kubernetes: None where the API is never asked."""

    capture: Mapping[str, Any] = field(default_factory=dict)
    agent_socket: str | None = None
    kubernetes: Mapping[str, Any] | None = None
    on_failure: OnFailure = "block"
    runtime_capture: Mapping[str, Any] = field(default_factory=dict)
    resolvers: tuple[str, ...] | None = None


def read(config: Mapping[str, Any]) -> Entry:
    """Our entry. Raises one CniError with all that is wrong in it: keys that are unknown, values of another type."""
    problems: list[str] = []
    unknown = sorted(key for key in config if key not in SPECIFIED | OURS and not key.startswith(RESERVED_PREFIX))
    problems += [f"{key}: no such key; ours are {', '.join(sorted(OURS))}" for key in unknown]
    capture = _object(config, "capture", problems) or {}
    kubernetes = _object(config, "kubernetes", problems)
    socket_path = config.get("agentSocket")
    if socket_path is not None and not (isinstance(socket_path, str) and socket_path.startswith("/")):
        problems.append(f"agentSocket: {socket_path!r}: an absolute path")
    if kubernetes is not None and socket_path is None:
        problems.append("kubernetes: needs agentSocket; the node agent alone asks the API")
    on_failure = config.get("onFailure", "block")
    if on_failure not in ("block", "bypass"):
        problems.append(f"onFailure: {on_failure!r}: block or bypass")
    runtime = _object(config, "runtimeConfig", problems) or {}
    runtime_capture = _object(runtime, CAPABILITY, problems, "runtimeConfig.") or {}
    if problems:
        raise CniError(INVALID_CONFIG, "the conflist's entry cannot be used", "; ".join(problems))
    return Entry(capture, socket_path, kubernetes, on_failure, runtime_capture, _resolvers(config, runtime))


def _object(holder: Mapping[str, Any], key: str, problems: list[str], place: str = "") -> JsonObject | None:
    value = holder.get(key)
    if value is None or isinstance(value, dict):
        return value
    problems.append(f"{place}{key}: {value!r}: a JSON object")
    return None


def _resolvers(config: Mapping[str, Any], runtime: Mapping[str, Any]) -> tuple[str, ...] | None:
    # The pod's resolv.conf isn't written yet. What it will say comes by the `dns` capability ("servers", CONVENTIONS.md) or
    # from the primary plugin ("nameservers", section 5); containerd sends an empty object where it knows nothing.
    previous = config.get("prevResult")
    # containerd (its go-cni) writes the capability's keys with a capital letter, which Go programs read as well.
    dns = runtime.get("dns")
    sources = (
        (dns, "servers"),
        (dns, "Servers"),
        (previous.get("dns") if isinstance(previous, dict) else None, "nameservers"),
    )
    for source, key in sources:
        servers = source.get(key) if isinstance(source, dict) else None
        if isinstance(servers, list) and servers:
            return tuple(str(server) for server in servers)
    return None
