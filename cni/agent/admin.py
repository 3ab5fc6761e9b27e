"""The agent's HTTP endpoints: /healthz, /readyz, /metrics."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

from cni.agent.attachments import Attachments, State
from cni.agent.metrics import Metrics
from interceptor.proxy.admin_http import AdminHttp, Request, Response
from interceptor.proxy.exposition import CONTENT_TYPE, Family, Sample, build, process, render

STATES: tuple[State, ...] = ("captured", "skipped", "drifted", "early")


class Admin:
    """Answers for an agent that is `ready` or not, and for what it counts."""

    def __init__(self, metrics: Metrics, attachments: Attachments) -> None:
        self.ready = False
        self._metrics = metrics
        self._attachments = attachments
        self._server: AdminHttp | None = None

    def serve(self, listener: socket.socket) -> None:
        """Begin to answer at `listener`."""
        self._server = AdminHttp([listener], self.answer)
        self._server.start()

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.close()

    def answer(self, request: Request) -> Response:
        """One request."""
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"GET or HEAD\n", allow="GET, HEAD")
        match request.path:
            case "/healthz":
                return Response(200, b"ok\n")
            case "/readyz":
                return Response(200, b"ready\n") if self.ready else Response(503, b"not ready\n")
            case "/metrics":
                return Response(200, render(self._families()), CONTENT_TYPE)
            case _:
                return Response(404, b"/healthz, /readyz, /metrics\n")

    def _families(self) -> Iterator[Family]:
        yield from self._metrics.families()
        states = Counter(attachment.state for attachment in self._attachments.all())
        pods = [Sample(states[state], (("state", state),)) for state in STATES]
        yield Family("interceptor_cni_pods", "gauge", "Pods of this node, by what is known of their rules.", pods)
        yield build()
        yield from process()
