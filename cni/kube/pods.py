"""This node's pods, kept by list and watch, and what an ADD asks: one pod with its namespace's annotations.

Kubernetes' own rules for watching (kubernetes.io/docs/reference/using-api/api-concepts): begin at the list's resourceVersion,
move on with every event and bookmark, list again on 410.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cni.annotations.view import PodView, Texts, view
from cni.kube.api import GONE, NOT_FOUND, Api, ApiError, JsonObject
from cni.protocol import TRY_AGAIN_LATER, CniError

PAGE = 100  # of a list: 500 pods at once would be tens of megabytes of JSON
WATCH_S = 300
# A bookmark comes every minute; a connection that says less is broken.
SILENT_S = 120.0
BACKOFF_FIRST_S = 0.25
BACKOFF_MOST_S = 5.0
# A watch that lasts so long was one: the next trouble is another.
SETTLED_S = 10.0
WATCH_LEAST_S = 0.25
# Within the shim's 30 s. The API may know a pod a moment later than the kubelet.
LOOKUP_S = 20.0
NAMESPACE_TTL_S = 5.0
ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class KnownPod:
    """A pod of this node: its `view` lacks the namespace's annotations."""

    view: PodView
    resource_version: str = ""
    phase: str = ""
    is_deleting: bool = False

    @property
    def runs(self) -> bool:
        """Whether its network namespace may still be needed."""
        return not self.is_deleting and self.phase not in ENDED


class Pods:
    """The pods of `node`. `start()` begins to follow them; until `is_synced` each lookup asks the API."""

    def __init__(self, api: Api, node: str, tell: Callable[..., None] = lambda _event, **_fields: None) -> None:
        self._api = api
        self._node = node
        self._tell = tell
        self._lock = threading.Lock()
        self._pods: dict[tuple[str, str], KnownPod] = {}
        self._namespaces: dict[str, tuple[float, Texts, Texts]] = {}
        self._stopping = threading.Event()
        self.is_synced = False
        self._thread = threading.Thread(target=self._follow, name="pods", daemon=True)

    def start(self) -> None:
        """Begin to follow, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Follow no more. A watch that waits is left to end with the process."""
        self._stopping.set()

    def all(self) -> list[KnownPod]:
        """All pods of the node that are known now."""
        with self._lock:
            return list(self._pods.values())

    def lookup(self, namespace: str, name: str, uid: str, patience_s: float = LOOKUP_S) -> PodView:
        """The pod and its namespace's annotations. Raises CniError (11) when the API does not tell within `patience_s`."""
        deadline = time.monotonic() + patience_s
        pause = BACKOFF_FIRST_S
        while True:
            try:
                return self.with_namespace(self._pod(namespace, name, uid))
            except ApiError as error:
                trouble = str(error)
            if time.monotonic() + pause >= deadline:
                raise CniError(TRY_AGAIN_LATER, f"the Kubernetes API does not tell about {namespace}/{name}", trouble)
            self._stopping.wait(pause)
            pause = min(pause * 2, BACKOFF_MOST_S)

    def with_namespace(self, found: PodView) -> PodView:
        """`found` with the annotations and labels of its namespace. Raises ApiError."""
        known = self._namespaces.get(found.namespace)
        if known is None or known[0] < time.monotonic():
            filled = view({}, self._api.get(f"/api/v1/namespaces/{found.namespace}"))
            known = (time.monotonic() + NAMESPACE_TTL_S, filled.namespace_annotations, filled.namespace_labels)
            self._namespaces[found.namespace] = known
        return replace(found, namespace_annotations=known[1], namespace_labels=known[2])

    def _pod(self, namespace: str, name: str, uid: str) -> PodView:
        with self._lock:
            known = self._pods.get((namespace, name))
        # Another pod of the same name, which this one replaces, may still be in the cache; and in the API's own.
        if known is not None and uid in ("", known.view.uid):
            return known.view
        found = view(self._api.get(f"/api/v1/namespaces/{namespace}/pods/{name}"), {})
        if uid not in ("", found.uid):
            raise ApiError(NOT_FOUND, f"pod {namespace}/{name} with uid {uid}; there is {found.uid}")
        return found

    def _follow(self) -> None:
        pause = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._list_and_watch()
            except ApiError as error:
                if error.status != GONE:  # too long away: what happened meanwhile is in a new list
                    self._tell("api", error=str(error), retry_s=pause)
            except Exception:  # noqa: BLE001 - the edge of this thread: without it, no pod would be known any more
                self._tell("bug", traceback=traceback.format_exc())
            if time.monotonic() - began > SETTLED_S:
                pause = BACKOFF_FIRST_S
            self._stopping.wait(pause)
            pause = min(pause * 2, BACKOFF_MOST_S)

    def _list_and_watch(self) -> None:
        version = self._list()
        self._set_synced()
        while not self._stopping.is_set():
            began = time.monotonic()
            version = self._watch(version)
            # Whoever ends each watch at once is not to be asked without pause.
            self._stopping.wait(max(0.0, began + WATCH_LEAST_S - time.monotonic()))

    def _set_synced(self) -> None:
        if not self.is_synced:
            self._tell("synced", pods=len(self._pods))
        self.is_synced = True

    def _list(self) -> str:
        """Replace what is known; the resourceVersion to watch from."""
        found: dict[tuple[str, str], KnownPod] = {}
        query: dict[str, str | int] = {"fieldSelector": f"spec.nodeName={self._node}", "limit": PAGE}
        while True:
            page = self._api.get("/api/v1/pods", **query)
            for item in _items(page):
                pod = known_pod(item)
                found[pod.view.namespace, pod.view.name] = pod
            meta = _meta(page)
            if not meta.get("continue"):
                break
            query["continue"] = str(meta["continue"])
        with self._lock:
            self._pods = found
        return str(meta.get("resourceVersion", ""))

    def _watch(self, version: str) -> str:
        """Follow until the server ends it; the resourceVersion to go on from. Raises ApiError."""
        query: dict[str, str | int] = {
            "fieldSelector": f"spec.nodeName={self._node}",
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": WATCH_S,
        }
        for event in self._api.lines("/api/v1/pods", SILENT_S, **query):
            item = event.get("object")
            item = item if isinstance(item, dict) else {}
            kind = event.get("type")
            if kind == "ERROR":
                code = item.get("code")
                raise ApiError(code if isinstance(code, int) else 0, str(item.get("message", "")))
            version = str(_meta(item).get("resourceVersion", version))
            self._apply(str(kind), item)
            if self._stopping.is_set():
                break
        return version

    def _apply(self, kind: str, item: JsonObject) -> None:
        if kind not in ("ADDED", "MODIFIED", "DELETED"):
            return  # a bookmark
        pod = known_pod(item)
        key = (pod.view.namespace, pod.view.name)
        with self._lock:
            if kind == "DELETED":
                self._pods.pop(key, None)
            else:
                self._pods[key] = pod


def known_pod(item: JsonObject) -> KnownPod:
    """What is kept of a pod's object."""
    meta, status = _meta(item), item.get("status")
    status = status if isinstance(status, dict) else {}
    ips = [each.get("ip") for each in status.get("podIPs") or () if isinstance(each, dict)] or [status.get("podIP")]
    return KnownPod(
        view(item, {}, tuple(ip for ip in ips if isinstance(ip, str))),
        str(meta.get("resourceVersion", "")),
        str(status.get("phase", "")),
        "deletionTimestamp" in meta,
    )


def _items(page: Mapping[str, Any]) -> list[JsonObject]:
    items = page.get("items")
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _meta(item: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = item.get("metadata")
    return meta if isinstance(meta, dict) else {}
