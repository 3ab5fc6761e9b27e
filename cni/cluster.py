"""The entry's `kubernetes` object, as typed values. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interceptor.errors import ConfigError, Problem

MESHES = ("istio", "linkerd", "kuma")


@dataclass(frozen=True, slots=True)
class Cluster:
    """exclude_namespaces: left alone. agent_namespace, agent_prefix: the agent's own pods, which must start without it.

    proxy_containers: names that mark a pod whose proxy is ours; meshes: whose sidecars and annotations are known.
    """

    exclude_namespaces: tuple[str, ...] = ("kube-system",)
    agent_namespace: str = "interceptor"
    agent_prefix: str = "interceptor-cni-"
    proxy_containers: tuple[str, ...] = ("interceptor-proxy",)
    meshes: tuple[str, ...] = MESHES


def read(kubernetes: Mapping[str, Any]) -> Cluster:
    """The typed form. Raises ConfigError with all that is wrong."""
    problems: list[Problem] = []
    known = {
        "excludeNamespaces": ("exclude_namespaces", _names),
        "agentNamespace": ("agent_namespace", _name),
        "agentPrefix": ("agent_prefix", _name),
        "proxyContainers": ("proxy_containers", _names),
        "meshes": ("meshes", _meshes),
    }
    found: dict[str, Any] = {}
    for key, value in kubernetes.items():
        place = f"kubernetes.{key}"
        if key not in known:
            problems.append(Problem(place, _shown(value), f"no such key; there are {', '.join(known)}"))
            continue
        field, parse = known[key]
        try:
            found[field] = parse(value)
        except ValueError as error:
            problems.append(Problem(place, _shown(value), str(error)))
    if problems:
        raise ConfigError(problems)
    return Cluster(**found)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a name")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ValueError("a list of names")
    return tuple(value)


def _meshes(value: object) -> tuple[str, ...]:
    names = _names(value)
    if unknown := [name for name in names if name not in MESHES]:
        raise ValueError(f"{', '.join(unknown)}: known are {', '.join(MESHES)}")
    return names


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:200]
