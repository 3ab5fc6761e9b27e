"""The agent's life: listen, be ready, serve, hand over. What is served is the other modules' business."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
from contextlib import ExitStack
from dataclasses import dataclass

from cni.agent import server
from cni.agent.admin import Admin
from cni.agent.attachments import Attachments
from cni.agent.log import log
from cni.agent.metrics import Metrics
from cni.agent.work import Worker

ATTACHMENTS = "attachments"


@dataclass(frozen=True, slots=True)
class Settings:
    """socket_path: where shims ask. http: (address, port) of health and metrics, or None for none."""

    socket_path: str
    http: tuple[str, int] | None = None


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; what was accepted by then is answered. Raises AgentError."""
    stopped = _told_to_stop()
    _raise_descriptor_limit()
    metrics = Metrics()
    attachments = _attachments(settings.socket_path)
    worker = Worker(attachments, metrics)
    with ExitStack() as stack:
        # Last of all: a shim that can connect gets its answer.
        admin = Admin(metrics, attachments)
        if settings.http is not None:
            admin.serve(_http_listener(*settings.http))
            stack.callback(admin.close)
        listening = server.listen(settings.socket_path)
        serving = server.Server(listening, worker.answer, _refused(metrics))
        thread = threading.Thread(target=serving.run, name="accept", daemon=True)
        thread.start()
        admin.ready = True
        log("ready", socket=settings.socket_path, http=settings.http, attachments=len(attachments.all()))
        _wait_for(stopped)
        admin.ready = False
        log("stopping")
        serving.stop()
        thread.join()
    log("stopped")
    return 0


def _told_to_stop() -> int:
    # An eventfd, not a threading.Event: a handler may run while the main thread holds the Event's lock.
    told = os.eventfd(0, os.EFD_CLOEXEC)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: os.eventfd_write(told, 1))
    return told


def _wait_for(told: int) -> None:
    # Unlike most calls it isn't repeated after a signal; the handler has run by then.
    while True:
        try:
            os.eventfd_read(told)
        except InterruptedError:
            continue
        return


def _raise_descriptor_limit() -> None:
    # One for each pod whose namespace cannot be seen from here, and a few for each request.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _attachments(socket_path: str) -> Attachments:
    folder = os.path.join(os.path.dirname(socket_path), ATTACHMENTS)
    try:
        return Attachments(folder)
    except OSError as error:
        raise server.AgentError(f"{folder}: {error.strerror}") from error


def _http_listener(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # An agent that takes over begins before the old one has ended.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise server.AgentError(f"listening at {address} port {port}: {error.strerror}") from error
    return listener


def _refused(metrics: Metrics) -> server.Refused:
    def refused(reason: str) -> None:
        metrics.refused()
        log("refused", reason=reason)

    return refused
