"""Whatever stands in a pod's objects: a Decision or a ConfigError, never anything else."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cni import pod
from cni.annotations import istio, kuma, linkerd
from cni.annotations.view import view
from cni.entry import Entry
from cni.pod import Capture, Skip
from cni.protocol import Request
from interceptor.config import FIELDS
from interceptor.errors import ConfigError

NAMES = [
    *(row.annotation for row in FIELDS),
    *(value for mesh in (istio, kuma, linkerd) for value in vars(mesh).values() if isinstance(value, str) and "/" in value),
    *kuma.TEXTS,
    *kuma.SWITCHES,
    *kuma.PORTS,
    pod.CAPTURE,
]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "*", "true", "false", "enabled", "80", "80,443", "1-5", "10.0.0.0/8", "fd00::/8", "REDIRECT", "TPROXY"]
    ),
    st.sampled_from(["redirect: {inbound: {port: 1}}", "a: &a [*a]", "x: 0x" + "f" * 9000, "[", "a: 2001-99-99", "? {}: 1"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ANNOTATIONS = st.dictionaries(st.sampled_from(NAMES), TEXTS, max_size=6)
CONTAINER = st.fixed_dictionaries(
    {"name": st.sampled_from(["app", "istio-proxy", "linkerd-proxy", "kuma-sidecar", "interceptor-proxy"])},
    optional={
        "securityContext": st.fixed_dictionaries({}, optional={"runAsUser": JSON, "runAsGroup": st.integers(-1, 2**33)}) | JSON,
        "args": st.lists(st.sampled_from(["proxy", "sidecar", "router", ""])) | JSON,
        "env": st.lists(st.fixed_dictionaries({"name": st.text(max_size=9), "value": TEXTS})) | JSON,
    },
)
POD = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {"namespace": st.just("shop"), "name": st.just("web")}, optional={"annotations": ANNOTATIONS | JSON, "labels": JSON}
        ),
        "spec": st.fixed_dictionaries(
            {"containers": st.lists(CONTAINER, max_size=3) | JSON},
            optional={"initContainers": st.lists(CONTAINER, max_size=2) | JSON, "securityContext": JSON, "hostNetwork": JSON},
        ),
    }
)
NAMESPACE = st.fixed_dictionaries({"metadata": st.fixed_dictionaries({"annotations": ANNOTATIONS})}) | JSON
ARGS = {"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": "web"}
MESHES = {"interceptor.io/outbound": "off", "sidecar.istio.io/status": "{}", "kuma.io/sidecar-injected": "true"}


def check(found: Any, namespace: Any) -> None:
    entry = Entry(agent_socket="/x", kubernetes={})
    try:
        decision = pod.decide(Request("ADD", args=ARGS), entry, lambda *_: view(found, namespace, ("10.0.0.1",)))
    except ConfigError:
        return
    assert isinstance(decision, Capture | Skip)
    assert decision.reason


@given(POD, NAMESPACE)
def test_any_pod(found: Any, namespace: Any) -> None:
    check(found, namespace)


@given(ANNOTATIONS, st.sampled_from(["istio-proxy", "linkerd-proxy", "kuma-sidecar", "interceptor-proxy"]))
def test_any_annotations_of_an_injected_pod(annotations: dict[str, str], proxy: str) -> None:
    meta = {"namespace": "shop", "name": "web", "annotations": {**MESHES, **annotations}}
    check({"metadata": meta, "spec": {"containers": [{"name": proxy}]}}, {})


@given(JSON, JSON)
def test_any_json(found: Any, namespace: Any) -> None:
    check(found, namespace)
