"""Requests to the API server: JSON in, JSON out, a line at a time for watches. Knows no kind of object.

The token is read anew for each request: a projected one is replaced every hour, and an agent that keeps the old one
locks its node out (istio#57438).
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
TIMEOUT_S = 10.0
# An object is at most 1.5 MiB (etcd's limit), and a list is asked for in pages.
MAX_ANSWER = 64 << 20
MERGE_PATCH = "application/merge-patch+json"
UNAUTHORIZED, NOT_FOUND, CONFLICT, GONE = 401, 404, 409, 410


class ApiError(Exception):
    """The API refused, or cannot be reached: then `status` is 0."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f"{status}: {message}" if status else message)


@dataclass(frozen=True, slots=True)
class Server:
    """Where the API is and how to be let in; `ca_file` None for http, or for the system's authorities."""

    url: str
    token_file: str | None = None
    ca_file: str | None = None


def in_cluster(environment: Mapping[str, str], folder: str = SERVICE_ACCOUNT) -> Server:
    """The server as a pod finds it. Raises ApiError outside of a cluster."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ApiError(0, "KUBERNETES_SERVICE_HOST is not set: not in a pod; give --kube-api URL")
    shown = f"[{host}]" if ":" in host else host
    return Server(f"https://{shown}:{port}", os.path.join(folder, "token"), os.path.join(folder, "ca.crt"))


class Api:
    """Talks to one server, from any thread; each request has a connection of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        try:
            self._url = urllib.parse.urlsplit(server.url)
            is_usable = self._url.scheme in ("http", "https") and bool(self._url.hostname) and self._url.port != 0
        except ValueError:  # a port of six digits, half a bracket
            is_usable = False
        if not is_usable:
            raise ApiError(0, f"{server.url!r} is no http:// or https:// URL")

    def get(self, path: str, **query: str | int) -> JsonObject:
        """One object or list. Raises ApiError."""
        return self._exchange("GET", path, query)

    def post(self, path: str, body: JsonObject) -> JsonObject:
        """Create an object. Raises ApiError."""
        return self._exchange("POST", path, {}, body)

    def patch(self, path: str, body: JsonObject) -> JsonObject:
        """Change an object by a merge patch (RFC 7396). Raises ApiError."""
        return self._exchange("PATCH", path, {}, body, MERGE_PATCH)

    def delete(self, path: str, body: JsonObject) -> JsonObject:
        """Delete an object; `body` are DeleteOptions. Raises ApiError."""
        return self._exchange("DELETE", path, {}, body)

    def lines(self, path: str, timeout_s: float, **query: str | int) -> Iterator[JsonObject]:
        """A watch: each line's object, until the server ends it. Raises ApiError, also when it is silent for `timeout_s`."""
        connection, response = self._send("GET", path, query, None, "", timeout_s)
        try:
            while line := response.readline(MAX_ANSWER):
                if line.strip():
                    yield _object(line)
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"watching {path}: {error}") from error
        finally:
            connection.close()

    def _exchange(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: JsonObject | None = None,
        content_type: str = "application/json",
    ) -> JsonObject:
        connection, response = self._send(method, path, query, body, content_type, TIMEOUT_S)
        try:
            return _object(response.read(MAX_ANSWER))
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"{method} {path}: {error}") from error
        finally:
            connection.close()

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: JsonObject | None,
        content_type: str,
        timeout_s: float,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        target = path + ("?" + urllib.parse.urlencode(query) if query else "")
        headers = {"Accept": "application/json", "User-Agent": "interceptor-cni"}
        if body is not None:
            headers["Content-Type"] = content_type
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        connection = self._connection(timeout_s)
        refusal = b""
        try:
            connection.request(method, target, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status >= 300:
                refusal = response.read(MAX_ANSWER)
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a name that can be no host's
            connection.close()
            raise ApiError(0, f"{method} {self._server.url}{path}: {error}") from error
        if response.status >= 300:
            connection.close()
            raise ApiError(response.status, _message(refusal) or response.reason)
        return connection, response

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        host = self._url.hostname or ""
        if self._url.scheme == "http":
            return http.client.HTTPConnection(host, self._url.port, timeout=timeout_s)
        try:
            # The authority may be replaced too.
            context = ssl.create_default_context(cafile=self._server.ca_file)
        except OSError as error:
            raise ApiError(0, f"{self._server.ca_file}: {error.strerror or error}") from error
        return http.client.HTTPSConnection(host, self._url.port, timeout=timeout_s, context=context)

    def _token(self) -> str:
        if self._server.token_file is None:
            return ""
        try:
            with open(self._server.token_file, encoding="ascii", errors="replace") as file:
                token = file.read().strip()
        except OSError as error:
            raise ApiError(0, f"{self._server.token_file}: {error.strerror}") from error
        if not token.isprintable() or not token.isascii():
            raise ApiError(0, f"{self._server.token_file}: it holds no token")
        return token


def _object(text: bytes) -> JsonObject:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(0, f"the answer is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(0, "the answer is not a JSON object")
    return found


def _message(text: bytes) -> str:
    try:
        return str(_object(text).get("message", ""))
    except ApiError:
        return text[:200].decode(errors="replace")
