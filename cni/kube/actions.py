"""What the agent changes in the API: a pod's label, a broken pod, events, this node's taint. Raises ApiError."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Literal

from cni.annotations.view import PodView
from cni.kube.api import CONFLICT, NOT_FOUND, Api, ApiError
from cni.kube.pods import KnownPod

COMPONENT = "interceptor-cni"
DRIFTED_LABEL = "interceptor.io/uncaptured"
NOT_READY_TAINT = "interceptor.io/not-ready"
ATTEMPTS = 5  # of a change that others make at the same time


def label(api: Api, pod: PodView) -> None:
    """Mark a pod whose traffic is not captured."""
    api.patch(f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", {"metadata": {"labels": {DRIFTED_LABEL: "true"}}})


def delete(api: Api, pod: KnownPod) -> None:
    """Delete this very pod, as it was seen: one that has changed since, or that took its name, stays."""
    view = pod.view
    preconditions = {"uid": view.uid, "resourceVersion": pod.resource_version}
    options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
    try:
        api.delete(f"/api/v1/namespaces/{view.namespace}/pods/{view.name}", options)
    except ApiError as error:
        if error.status not in (NOT_FOUND, CONFLICT):
            raise


def event(api: Api, pod: PodView, node: str, reason: str, message: str, kind: Literal["Normal", "Warning"]) -> None:
    """Tell whoever looks at the pod (kubectl describe)."""
    now = datetime.now(UTC)
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        # As client-go names them: the pod's name and a number that no other event of it has.
        "metadata": {"name": f"{pod.name}.{int(now.timestamp() * 1e9) ^ os.getpid():x}", "namespace": pod.namespace},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
        },
        "reason": reason,
        "message": message[:1000],
        "type": kind,
        "source": {"component": COMPONENT, "host": node},
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
    api.post(f"/api/v1/namespaces/{pod.namespace}/events", body)


def remove_taint(api: Api, node: str, key: str = NOT_READY_TAINT) -> bool:
    """Let pods onto this node: take away the taint `key`; whether there was one."""
    for attempt in range(ATTEMPTS):
        found = api.get(f"/api/v1/nodes/{node}")
        taints = (found.get("spec") or {}).get("taints") or []
        kept = [taint for taint in taints if taint.get("key") != key]
        if len(kept) == len(taints):
            return False
        # A merge patch replaces the list: only if nobody has changed it since.
        change = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "spec": {"taints": kept}}
        try:
            api.patch(f"/api/v1/nodes/{node}", change)
        except ApiError as error:
            if error.status != CONFLICT or attempt == ATTEMPTS - 1:
                raise
        else:
            return True
    return False
