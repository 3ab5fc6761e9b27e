"""What to do for one pod: capture it, with which options, or leave it alone, and why. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from interceptor import sources
from interceptor.config import Config, Names
from interceptor.errors import ConfigError, Problem
from interceptor.sources import Layer

if TYPE_CHECKING:
    from cni.annotations.view import Meant, PodView
    from cni.cluster import Cluster
    from cni.entry import Entry
    from cni.protocol import JsonObject, Request

# CNI_ARGS can carry options without Kubernetes (`podman run --annotation`, ctr): named as their environment variables are.
ARGS_PREFIX = sources.ENV_PREFIX
# Beside the options' annotations: on a pod, or on its namespace for all of its pods.
BY_CONFLIST = "the conflist's entry says so"
CAPTURE = "interceptor.io/capture"
# A node has hundreds of pods, of fewer kinds.
KNOWN_MOST = 256
_known: dict[str, Config] = {}


@dataclass(frozen=True, slots=True)
class Capture:
    """Capture the pod. `resolvers`: the name servers of the pod's coming resolv.conf; None where nobody told."""

    config: Config
    resolvers: tuple[str, ...] | None = None
    reason: str = BY_CONFLIST


@dataclass(frozen=True, slots=True)
class _Mesh:
    applies: Callable[[PodView], bool]
    read: Callable[[PodView], Meant]


@dataclass(frozen=True, slots=True)
class Skip:
    """Leave the pod alone."""

    reason: str


Decision: TypeAlias = Capture | Skip
# (namespace, name, uid or "") -> the pod as the API knows it. May take long, and may raise CniError.
Lookup: TypeAlias = "Callable[[str, str, str], PodView]"


def decide(request: Request, entry: Entry, lookup: Lookup | None = None) -> Decision:
    """Whether and how. Raises ConfigError, and what `lookup` raises.

    Without `kubernetes` in the entry: the conflist, over it the runtime's wish for this pod, over both CNI_ARGS. With it, the
    pod's objects decide too, and are asked for only when CNI_ARGS leave the question open.
    """
    if entry.kubernetes is None:
        return _captured(request, entry)

    from cni import cluster  # only where Kubernetes is

    known = cluster.read(entry.kubernetes)
    if lookup is None:
        return _captured(request, entry)  # STATUS, or an installer's look at the entry
    name, namespace = request.args.get("K8S_POD_NAME"), request.args.get("K8S_POD_NAMESPACE")
    if not name or not namespace:  # podman sends a name alone
        return Skip("CNI_ARGS name no pod: not called by Kubernetes")
    if skip := _by_name(namespace, name, known):
        return skip
    found = lookup(namespace, name, request.args.get("K8S_POD_UID", ""))
    return of_pod(request, entry, known, replace(found, ips=_ips(request)))


def of_pod(request: Request, entry: Entry, known: Cluster, pod: PodView) -> Decision:
    """The same for a pod whose objects are at hand. Raises ConfigError."""
    if skip := _by_name(pod.namespace, pod.name, known):
        return skip
    if pod.host_network:
        return Skip("it is in the host's network namespace")
    for place, text in (("pod", pod.annotations.get(CAPTURE)), ("namespace", pod.namespace_annotations.get(CAPTURE))):
        if text == "true":
            break
        if text == "false":
            return Skip(f"the {place}'s annotation {CAPTURE} is {text}")
        if text is not None:
            # A slip must not let a pod go uncaptured.
            raise ConfigError([Problem(f"the {place}'s annotation {CAPTURE}", text, "true or false")])
    for name, mesh in _meshes(known).items():
        if mesh.applies(pod):
            meant = mesh.read(pod)
            if meant.skip is not None:
                return Skip(f"{name}: {meant.skip}")
            return _captured(request, entry, (meant.layer,), _own_annotations(pod), f"it has a sidecar of {name}")
    proxy = next((found for each in known.proxy_containers if (found := pod.container(each))), None)
    if proxy is None:
        return Skip("it has no proxy container")
    identity = {"proxy_uid": proxy.uid, "proxy_gid": proxy.gid}
    layer = sources.from_object({key: value for key, value in identity.items() if value}, f"container {proxy.name}")
    return _captured(request, entry, (layer,), _own_annotations(pod), f"it has the container {proxy.name}")


def _ips(request: Request) -> tuple[str, ...]:
    # protocol.passed_on has judged the result's shape; a CHECK of old may have none.
    previous = request.config.get("prevResult")
    ips = previous.get("ips", []) if isinstance(previous, dict) else []
    return tuple(str(ip["address"]).partition("/")[0] for ip in ips if isinstance(ip, dict) and "address" in ip)


def _by_name(namespace: str, name: str, known: Cluster) -> Skip | None:
    # First, and by name alone: this pod must start while the agent, and its token, are of no use.
    if namespace == known.agent_namespace and name.startswith(known.agent_prefix):
        return Skip("it is the node agent's own pod")
    if namespace in known.exclude_namespaces:
        return Skip(f"namespace {namespace} is excluded")
    return None


def _meshes(known: Cluster) -> Mapping[str, _Mesh]:
    from cni.annotations import istio, kuma, linkerd  # only where Kubernetes is

    found: Mapping[str, _Mesh] = {
        "istio": _Mesh(istio.applies, istio.read),
        "linkerd": _Mesh(linkerd.applies, linkerd.read),
        "kuma": _Mesh(kuma.applies, kuma.read),
    }
    return {name: found[name] for name in known.meshes}


def _own_annotations(pod: PodView) -> dict[str, str]:
    return {name: text for name, text in {**pod.namespace_annotations, **pod.annotations}.items() if name != CAPTURE}


def _captured(
    request: Request,
    entry: Entry,
    layers: Sequence[Layer] = (),
    annotations: Mapping[str, str] | None = None,
    reason: str = BY_CONFLIST,
) -> Decision:
    objects = [(dict(entry.capture), "capture"), (dict(entry.runtime_capture), "runtimeConfig.interceptor")]
    environment = {name: value for name, value in request.args.items() if name.startswith(ARGS_PREFIX)}
    config = _config(objects, list(layers), environment, annotations)
    if config.outbound == config.inbound == config.udp == config.dns == "off":
        return Skip("outbound, inbound, udp and dns are off")
    return Capture(config, entry.resolvers, reason)


def _config(
    objects: list[tuple[JsonObject, str]],
    layers: list[Layer],
    environment: Mapping[str, str],
    annotations: Mapping[str, str] | None,
) -> Config:
    """The Config of these sources. Most pods of a node say the same; what is wrong is told anew each time."""
    said = repr((objects, layers, environment, annotations))
    config = _known.get(said)
    if config is None:
        config = sources.resolve(
            objects=(*(sources.from_object(found, place) for found, place in objects), *layers),
            environment=environment,
            annotations=annotations,
            names=Names(_no_name, _no_name),
        ).config
        if len(_known) >= KNOWN_MOST:
            _known.clear()
        _known[said] = config
    return config


def _no_name(name: str) -> int:
    # The host's users are not the pod's.
    raise KeyError(name)
