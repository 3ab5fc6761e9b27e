"""A pod as annotations are read from it: what the API's objects say, typed. Pure; anything may stand in an object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from interceptor.errors import Problem
from interceptor.sources import Given, Layer

Texts: TypeAlias = Mapping[str, str]
# What any module here reads. The rest, which may be large (kubectl's last-applied-configuration), is not kept for 500 pods.
PREFIXES = (
    *("interceptor.io/", "istio.io/", "sidecar.istio.io/", "traffic.sidecar.istio.io/"),
    *("linkerd.io/", "config.linkerd.io/", "kuma.io/", "traffic.kuma.io/"),
)
VARIABLES = ("DISABLE_ENVOY", "INVALID_DROP", "ISTIO_DUAL_STACK", "ISTIO_META_DNS_CAPTURE")


@dataclass(frozen=True, slots=True)
class Container:
    """`uid` and `gid` are those it will run under, as far as the objects say; None where the image decides.

    `args` are the first two, `env` those of VARIABLES.
    """

    name: str
    uid: int | None = None
    gid: int | None = None
    args: tuple[str, ...] = ()
    env: Texts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PodView:
    """`init` are the init containers: native sidecars are among them. `ips` are those that the pod was just given."""

    namespace: str
    name: str
    uid: str = ""
    annotations: Texts = field(default_factory=dict)
    labels: Texts = field(default_factory=dict)
    namespace_annotations: Texts = field(default_factory=dict)
    namespace_labels: Texts = field(default_factory=dict)
    host_network: bool = False
    containers: tuple[Container, ...] = ()
    init: tuple[Container, ...] = ()
    ips: tuple[str, ...] = ()

    def container(self, name: str) -> Container | None:
        """The container or native sidecar of this name."""
        return next((each for each in (*self.containers, *self.init) if each.name == name), None)

    def inherited(self, name: str) -> str | None:
        """An annotation of the pod, or else of its namespace."""
        return self.annotations.get(name, self.namespace_annotations.get(name))


@dataclass(frozen=True, slots=True)
class Meant:
    """What a mesh's annotations mean: options, by layer; or why the pod is left alone."""

    skip: str | None = None
    layer: Layer = field(default_factory=Layer)


class Options:
    """Collects options for a Layer, with the annotation that each came from."""

    def __init__(self, mesh: str) -> None:
        self._mesh = mesh
        self.layer = Layer()

    def put(self, name: str, text: str, place: str | None = None) -> None:
        """Option `name` has this text, since `place` says so; None: since this mesh is so."""
        self.layer.values[name] = Given(text, f"annotation {place}" if place else self._mesh, place or self._mesh)

    def refuse(self, place: str, value: str, expected: str) -> None:
        """`place` holds what cannot be carried out."""
        self.layer.problems.append(Problem(place, value, expected))


def view(pod: object, namespace: object, ips: tuple[str, ...] = ()) -> PodView:
    """A pod's and its namespace's objects, as the API gives them."""
    meta, spec = _at(pod, "metadata"), _at(pod, "spec")
    namespace_meta = _at(namespace, "metadata")
    context = _at(spec, "securityContext")
    return PodView(
        _text(meta.get("namespace")),
        _text(meta.get("name")),
        _text(meta.get("uid")),
        _texts(meta.get("annotations")),
        _texts(meta.get("labels")),
        _texts(namespace_meta.get("annotations")),
        _texts(namespace_meta.get("labels")),
        spec.get("hostNetwork") is True,
        tuple(_containers(spec.get("containers"), context)),
        tuple(_containers(spec.get("initContainers"), context)),
        ips,
    )


def is_false(text: str | None) -> bool:
    """Whether `text` is one of those that Go's strconv.ParseBool calls false."""
    return text in ("0", "f", "F", "false", "FALSE", "False")


def is_true(text: str | None) -> bool:
    """Whether `text` is one of those that Go's strconv.ParseBool calls true."""
    return text in ("1", "t", "T", "true", "TRUE", "True")


def _containers(found: object, pod_context: Mapping[str, Any]) -> Iterator[Container]:
    for each in found if isinstance(found, list) else ():
        if not isinstance(each, dict):
            continue
        context = _at(each, "securityContext")
        # The container's own goes over the pod's (core/v1 SecurityContext).
        uid = _id(context.get("runAsUser", pod_context.get("runAsUser")))
        gid = _id(context.get("runAsGroup", pod_context.get("runAsGroup")))
        args = each.get("args")
        words = tuple(word for word in args[:2] if isinstance(word, str)) if isinstance(args, list) else ()
        yield Container(_text(each.get("name")), uid, gid, words, dict(_env(each.get("env"))))


def _env(found: object) -> Iterator[tuple[str, str]]:
    for each in found if isinstance(found, list) else ():
        if isinstance(each, dict) and each.get("name") in VARIABLES and isinstance(each.get("value"), str):
            yield each["name"], each["value"]


def _at(found: object, key: str) -> Mapping[str, Any]:
    inside = found.get(key) if isinstance(found, dict) else None
    return inside if isinstance(inside, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _texts(found: object) -> Texts:
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str) and key.startswith(PREFIXES)}


def _id(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32 - 1 else None
