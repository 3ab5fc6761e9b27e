"""The admin port's endpoints: metrics, health, open flows, configuration, drain. Knows the proxy by `Administered` alone.

Who may ask what, and why: docs/decisions/0010-metrics-and-admin.md.
"""

from __future__ import annotations

import errno
import itertools
import json
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

from interceptor.errors import ProxyError
from interceptor.proxy import exposition
from interceptor.proxy.admin_http import BACKLOG, AdminHttp, Request, Response
from interceptor.proxy.open_flows import MAX_FLOWS
from interceptor.proxy.settings import ListenFamily

State: TypeAlias = Literal["starting", "serving", "draining"]


class Administered(Protocol):
    """What the admin port shows and does. All of it is called from the admin server's thread."""

    @property
    def state(self) -> State:
        """Where the proxy is in its life."""

    def totals(self) -> list[int]:
        """metrics.Region.totals."""

    def workers(self) -> Mapping[int, int]:
        """The worker processes: number -> pid. Empty when the proxy is this process."""

    def open_flows(self) -> Iterable[Mapping[str, Any]]:
        """The open connections, each a flow record as far as it is known."""

    def config(self) -> Mapping[str, Any]:
        """Option -> value and origin, as `interceptor config --json` prints it."""

    def drain(self) -> None:
        """Begin to drain."""


class Admin:
    """Answers a request."""

    def __init__(self, proxy: Administered) -> None:
        self._proxy = proxy
        # path -> method, who may ask, what answers
        self._endpoints: dict[str, tuple[str, Literal["anybody", "loopback"], Callable[[], Response]]] = {
            "/metrics": ("GET", "anybody", self._metrics),
            "/healthz": ("GET", "anybody", lambda: Response(200, b"ok\n")),
            "/readyz": ("GET", "anybody", self._ready),
            "/flows": ("GET", "loopback", self._flows),
            "/config": ("GET", "loopback", lambda: _json(self._proxy.config())),
            "/drain": ("POST", "loopback", self._drain),
        }

    def __call__(self, request: Request) -> Response:
        """The answer to `request`."""
        endpoint = self._endpoints.get(request.path)
        if endpoint is None:
            return Response(404, "".join(f"{path}\n" for path in self._endpoints).encode())
        method, who, answer = endpoint
        allowed = ("GET", "HEAD") if method == "GET" else (method,)
        if request.method not in allowed:
            return Response(405, f"{request.path} takes {' and '.join(allowed)}\n".encode(), allow=", ".join(allowed))
        if who == "loopback" and not request.is_local:
            return Response(403, f"{request.path} is for 127.0.0.1 and ::1 alone\n".encode())
        try:
            return answer()
        except Exception as error:  # noqa: BLE001  an edge: a fault in a page must not end the admin port
            return Response(500, f"{type(error).__name__}: {error}\n".encode())

    def _metrics(self) -> Response:
        counted = exposition.counted(self._proxy.totals())
        families = (*counted, *exposition.workers(self._proxy.workers()), *exposition.process(), exposition.build())
        return Response(200, exposition.render(families), exposition.CONTENT_TYPE)

    def _ready(self) -> Response:
        state = self._proxy.state
        return Response(200 if state == "serving" else 503, f"{state}\n".encode())

    def _flows(self) -> Response:
        flows = list(itertools.islice(self._proxy.open_flows(), MAX_FLOWS + 1))
        return _json({"flows": flows[:MAX_FLOWS], "more": len(flows) > MAX_FLOWS})

    def _drain(self) -> Response:
        self._proxy.drain()
        return Response(202, b"draining\n")


def _json(content: object) -> Response:
    return Response(200, json.dumps(content, ensure_ascii=False).encode() + b"\n", "application/json")


def open_admin(port: int, families: Iterable[ListenFamily], proxy: Administered) -> AdminHttp:
    """An admin server, listening on all addresses of `families`, not started. Raises ProxyError with nothing left bound."""
    listeners: list[socket.socket] = []
    try:
        for family in families:
            sock = _listen(port, family)
            listeners.append(sock)
    except OSError as error:
        for listener in listeners:
            listener.close()
        taken = "the port is taken" if error.errno == errno.EADDRINUSE else error.strerror
        raise ProxyError(f"listening on tcp port {port} (admin): {taken}; --admin-port off does without") from error
    return AdminHttp(listeners, Admin(proxy))


def _listen(port: int, family: ListenFamily) -> socket.socket:
    sock = socket.socket(socket.AF_INET if family == "v4" else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, family != "dual")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
