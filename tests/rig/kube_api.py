"""A Kubernetes API server for tests: pods, namespaces, nodes and events, with list, watch, bookmarks, 410, patches, deletes.

As exact as its clients need: the official Python client works against it, which tests/cni/test_kube.py shows.
"""

from __future__ import annotations

import copy
import json
import queue
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from interceptor.netns import entered
from tests.rig.net import Pod

KINDS = {"pods": "Pod", "namespaces": "Namespace", "nodes": "Node", "events": "Event"}
NAMESPACED = ("pods", "events")


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str = "") -> None:
        self.code, self.reason, self.message = code, reason, message or reason


@dataclass
class Api:
    """What the server holds, and switches for what goes wrong."""

    url: str = ""
    ca_file: str = ""
    token_file: str = ""
    tokens: set[str] = field(default_factory=lambda: {"good"})
    requests: list[tuple[str, str]] = field(default_factory=list)
    is_down: bool = False
    bookmark_s: float = 0.2
    watch_s: float = 60.0

    def __post_init__(self) -> None:
        self._objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._lock = threading.RLock()
        self._version = 100
        self._oldest = 100
        self._history: list[tuple[int, str, str, dict[str, Any]]] = []
        self._watchers: list[queue.Queue[tuple[str, str, dict[str, Any]] | None]] = []

    # What tests do.

    def put(self, plural: str, item: dict[str, Any]) -> dict[str, Any]:
        """Create or replace an object; its metadata is filled in."""
        with self._lock:
            meta = item.setdefault("metadata", {})
            key = (plural, meta.get("namespace", ""), meta["name"])
            meta.setdefault("uid", f"uid-{self._version}")
            known = key in self._objects
            return self._store("MODIFIED" if known else "ADDED", key, item)

    def pod(self, name: str, namespace: str = "shop", node: str = "node-1", **changes: Any) -> dict[str, Any]:
        """Create or replace a pod that runs on `node`."""
        meta = {"namespace": namespace, "name": name, **changes.pop("metadata", {})}
        spec = {"nodeName": node, "containers": [{"name": "app", "image": "x"}, {"name": "interceptor-proxy", "image": "x"}]}
        item = {
            "metadata": meta,
            "spec": {**spec, **changes.pop("spec", {})},
            "status": changes.pop("status", {"phase": "Running"}),
        }
        return self.put("pods", item)

    def get(self, plural: str, namespace: str, name: str) -> dict[str, Any] | None:
        """An object, or None."""
        with self._lock:
            return copy.deepcopy(self._objects.get((plural, namespace, name)))

    def all(self, plural: str) -> list[dict[str, Any]]:
        """All of a kind."""
        with self._lock:
            return [copy.deepcopy(item) for key, item in self._objects.items() if key[0] == plural]

    def remove(self, plural: str, namespace: str, name: str) -> None:
        """Delete an object."""
        with self._lock:
            key = (plural, namespace, name)
            self._store("DELETED", key, self._objects[key])

    def compact(self) -> None:
        """Forget history: a watch from before now is answered with 410."""
        with self._lock:
            self._version += 1
            self._oldest = self._version
            self._history.clear()

    def end_watches(self) -> None:
        """Close all watches, as a server that restarts does."""
        with self._lock:
            for watcher in self._watchers:
                watcher.put(None)

    # What requests do.

    def _store(self, event: str, key: tuple[str, str, str], item: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        item = copy.deepcopy(item)
        item.update(apiVersion="v1", kind=KINDS[key[0]])
        item["metadata"]["resourceVersion"] = str(self._version)
        item["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        if event == "DELETED":
            del self._objects[key]
        else:
            self._objects[key] = item
        self._history.append((self._version, event, key[0], item))
        for watcher in self._watchers:
            watcher.put((event, key[0], item))
        return copy.deepcopy(item)

    def listed(self, plural: str, namespace: str, query: dict[str, str]) -> dict[str, Any]:
        with self._lock:
            found = [item for item in self.all(plural) if _selected(item, namespace, query)]
            found.sort(key=lambda item: (item["metadata"].get("namespace", ""), item["metadata"]["name"]))
            start, limit = int(query.get("continue", 0)), int(query.get("limit", 0)) or len(found)
            meta = {"resourceVersion": str(self._version)}
            if start + limit < len(found):
                meta["continue"] = str(start + limit)
            return {"apiVersion": "v1", "kind": KINDS[plural] + "List", "metadata": meta, "items": found[start : start + limit]}

    def watched(self, plural: str, namespace: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        since = int(query.get("resourceVersion") or 0)
        mine: queue.Queue[tuple[str, str, dict[str, Any]] | None] = queue.Queue()
        with self._lock:
            if since and since < self._oldest:
                status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "code": 410, "reason": "Expired"}
                yield {"type": "ERROR", "object": {**status, "status": "Failure", "message": "too old resource version"}}
                return
            for version, event, kind, item in self._history:
                if version > since:
                    mine.put((event, kind, item))
            self._watchers.append(mine)
        deadline = time.monotonic() + min(self.watch_s, float(query.get("timeoutSeconds", 3600)))
        try:
            while time.monotonic() < deadline:
                try:
                    found = mine.get(timeout=self.bookmark_s)
                except queue.Empty:
                    if query.get("allowWatchBookmarks") == "true":
                        with self._lock:
                            meta = {"resourceVersion": str(self._version), "creationTimestamp": None}
                        yield {"type": "BOOKMARK", "object": {"apiVersion": "v1", "kind": KINDS[plural], "metadata": meta}}
                    continue
                if found is None:
                    return
                event, kind, item = found
                if kind == plural and _selected(item, namespace, query):
                    yield {"type": event, "object": item}
        finally:
            with self._lock:
                self._watchers.remove(mine)

    def patched(self, key: tuple[str, str, str], change: Any, content_type: str) -> dict[str, Any]:
        with self._lock:
            before = self._found(key)
            if content_type.startswith("application/json-patch"):
                raise Refused(415, "UnsupportedMediaType")
            wanted = (change.get("metadata") or {}).get("resourceVersion")
            if wanted is not None and wanted != before["metadata"]["resourceVersion"]:
                raise Refused(409, "Conflict", "the object has been modified")
            return self._store("MODIFIED", key, _merged(before, change))

    def deleted(self, key: tuple[str, str, str], options: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            before = self._found(key)
            for name, value in (options.get("preconditions") or {}).items():
                if before["metadata"].get(name) != value:
                    raise Refused(409, "Conflict", f"Precondition failed: {name}")
            return self._store("DELETED", key, before)

    def _found(self, key: tuple[str, str, str]) -> dict[str, Any]:
        found = self._objects.get(key)
        if found is None:
            raise Refused(404, "NotFound", f'{key[0]} "{key[2]}" not found')
        return copy.deepcopy(found)


def _selected(item: dict[str, Any], namespace: str, query: dict[str, str]) -> bool:
    meta = item["metadata"]
    fields = {"metadata.name": meta["name"], "metadata.namespace": meta.get("namespace", "")}
    fields["spec.nodeName"] = item.get("spec", {}).get("nodeName", "")
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        name, _, value = term.partition("=")
        if fields[name] != value.lstrip("="):
            return False
    return not namespace or meta.get("namespace") == namespace


def _merged(before: Any, change: Any) -> Any:
    # RFC 7396; strategic merge patches are taken for the same.
    if not isinstance(change, dict):
        return copy.deepcopy(change)
    found = copy.deepcopy(before) if isinstance(before, dict) else {}
    for key, value in change.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _merged(found.get(key), value)
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: Api

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else {}
        self.api.requests.append((self.command, self.path))
        try:
            self._let_in()
            self._route(url.path.strip("/").split("/"), query, body)
        except Refused as refusal:
            status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
            self._answer(refusal.code, {**status, "code": refusal.code, "reason": refusal.reason, "message": refusal.message})

    do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _let_in(self) -> None:
        if self.api.is_down:
            raise Refused(503, "ServiceUnavailable")
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.api.tokens:
            raise Refused(401, "Unauthorized")

    def _route(self, parts: list[str], query: dict[str, str], body: Any) -> None:
        if parts[0] in ("version", "api", "apis") and len(parts) == 1:
            self._answer(200, _discovery(parts[0]))
            return
        if parts[:2] != ["api", "v1"]:
            raise Refused(404, "NotFound")
        rest = parts[2:]
        if not rest:
            self._answer(200, _discovery("v1"))
            return
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        if rest[0] not in KINDS:
            raise Refused(404, "NotFound")
        self._carry_out(rest, namespace, query, body)

    def _carry_out(self, rest: list[str], namespace: str, query: dict[str, str], body: Any) -> None:
        plural = rest[0]
        key = (plural, namespace, rest[1] if len(rest) > 1 else "")
        match self.command:
            case "GET" if len(rest) == 1 and query.get("watch") in ("true", "1", "True"):
                self._watch(plural, namespace, query)
            case "GET" if len(rest) == 1:
                self._answer(200, self.api.listed(plural, namespace, query))
            case "GET":
                with self.api._lock:
                    self._answer(200, self.api._found(key))
            case "POST":
                body["metadata"].setdefault("namespace", namespace)
                self._answer(201, self.api.put(plural, body))
            case "PATCH":
                self._answer(200, self.api.patched(key, body, self.headers.get("Content-Type", "")))
            case "DELETE":
                self._answer(200, self.api.deleted(key, body))

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):
            for event in self.api.watched(plural, namespace, query):
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")

    def _answer(self, code: int, item: dict[str, Any]) -> None:
        text = json.dumps(item).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _discovery(what: str) -> dict[str, Any]:
    if what == "version":
        return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
    if what == "api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if what == "apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": []}
    verbs = ["get", "list", "watch", "patch", "delete", "create"]
    resources = [
        {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": plural in NAMESPACED, "verbs": verbs}
        for plural, kind in KINDS.items()
    ]
    return {"kind": "APIResourceList", "groupVersion": "v1", "resources": resources}


def certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, good for a day; the certificate is its own authority."""
    found, key = folder / "api.crt", folder / "api.key"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(found)]
    subprocess.run(argv, check=True, capture_output=True)
    return found, key


@contextmanager
def kube_api(runtime: Pod, folder: Path) -> Iterator[Api]:
    """A server at https://127.0.0.1 within `runtime`, which knows the namespaces shop and kube-system and node-1."""
    certificate_file, key = certificate(folder)
    token = folder / "token"
    token.write_text("good")
    api = Api(ca_file=str(certificate_file), token_file=str(token))
    handler = type("Handler", (_Handler,), {"api": api})
    with entered(runtime.path):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that went away
    api.url = f"https://127.0.0.1:{server.server_address[1]}"
    for name in ("shop", "kube-system", "interceptor"):
        api.put("namespaces", {"metadata": {"name": name}})
    api.put("nodes", {"metadata": {"name": "node-1"}, "spec": {}})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        api.end_watches()
        server.shutdown()
        thread.join()
        server.server_close()
