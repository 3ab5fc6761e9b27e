"""The agent's life: listen, be ready, serve, hand over. What is served is the other modules' business."""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue

from cni import pod
from cni.agent import server
from cni.agent.admin import Admin
from cni.agent.attachments import Attachments
from cni.agent.log import log
from cni.agent.metrics import Metrics
from cni.agent.node import ApiNode
from cni.agent.work import Decide, Worker
from cni.entry import Entry
from cni.kube import actions
from cni.kube.api import Api, ApiError, Server
from cni.kube.pods import Pods
from cni.pod import Decision
from cni.protocol import Request
from cni.repair import EVERY_S, Mode, Repairer
from interceptor import capture, netns
from interceptor.backends import netlink
from interceptor.config import Config
from interceptor.errors import ConfigError, InterceptorError, Problem

# How long a socket that was deleted stays away.
LOOK_S = 2.0
UNTAINT_RETRY_S = 5.0
SWITCH_S = 0.001


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """server: the API. node: this node's name. proc: where its processes are seen. untaint: let pods in once ready."""

    server: Server
    node: str
    proc: str = "/proc"
    untaint: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """socket_path: where shims ask. http: (address, port) of health and metrics, or None for none.

    repair: what becomes of pods without their rules. entry: the plugin's, for pods that were there before it.
    """

    socket_path: str
    http: tuple[str, int] | None = None
    repair: Mode = "heal"
    entry: Entry | None = None
    kubernetes: Kubernetes | None = None


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; what was accepted by then is answered. Raises AgentError."""
    threading.excepthook = _log_exception
    stopped = _told_to_stop()
    _raise_descriptor_limit()
    # A request takes a few milliseconds; by itself (5 ms) Python would let it wait as long for a thread that does not.
    sys.setswitchinterval(SWITCH_S)
    netlink.close_by(_closer())
    _rehearse()
    metrics = Metrics()
    attachments = _attachments(settings.socket_path)
    with ExitStack() as stack:
        cluster = _cluster(settings.kubernetes, stack)
        decide = _decider(cluster)
        worker = Worker(attachments, metrics, decide)
        # Last of all: a shim that can connect gets its answer.
        admin = Admin(metrics, attachments)
        if settings.http is not None:
            admin.serve(_http_listener(*settings.http))
            stack.callback(admin.close)
        serving = _Serving(settings.socket_path, worker, metrics)
        admin.ready = True
        if settings.repair != "off":
            node = cluster.node if cluster is not None else None
            repairer = Repairer(settings.repair, attachments, metrics, decide, log, node, settings.entry)
            stack.callback(_repeat(repairer.round))
        # What stands by now stays: nothing is to look for garbage in it again.
        gc.freeze()
        log("ready", socket=settings.socket_path, http=settings.http, attachments=len(attachments.all()))
        if cluster is not None and settings.kubernetes is not None and settings.kubernetes.untaint:
            threading.Thread(target=cluster.untaint, name="untaint", daemon=True).start()
        while not select.select([stopped], [], [], LOOK_S)[0]:
            if not os.path.lexists(settings.socket_path):
                # Somebody has cleaned up there: no shim reaches us any more.
                log("socket_gone", socket=settings.socket_path)
                attachments.make_folder()
                serving.stop()
                serving = _Serving(settings.socket_path, worker, metrics)
        admin.ready = False
        log("stopping")
        serving.stop()
    log("stopped")
    return 0


def _rehearse() -> None:
    """Do once for nobody what is done for each pod, so that the first is served as fast as the others.

    Modules are loaded, Python's and the kernel's, and what cannot be done on this node is in the log before a pod comes.
    """
    try:
        with netns.thrown_away():
            capture.enable(Config())
            capture.check(Config())
            capture.disable()
    except InterceptorError as error:
        log("rehearsal", error=str(error))
    except Exception:  # noqa: BLE001 - the edge: an agent that ends here would keep every pod of the node from starting
        log("rehearsal", traceback=traceback.format_exc())


class _Serving:
    """A socket at `path`, and the threads that answer there."""

    def __init__(self, path: str, worker: Worker, metrics: Metrics) -> None:
        self._server = server.Server(server.listen(path), worker.answer, _refused(metrics))
        self._thread = threading.Thread(target=self._server.run, name="accept", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more, and wait for what was accepted."""
        self._server.stop()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class _Cluster:
    api: Api
    pods: Pods
    node: ApiNode
    name: str

    def untaint(self) -> None:
        """Take this node's taint away, however long the API keeps us waiting."""
        while True:
            try:
                if actions.remove_taint(self.api, self.name):
                    log("untainted", node=self.name)
            except ApiError as error:
                log("api", error=str(error))
                time.sleep(UNTAINT_RETRY_S)
            else:
                return


def _cluster(settings: Kubernetes | None, stack: ExitStack) -> _Cluster | None:
    if settings is None:
        return None
    api = Api(settings.server)
    pods = Pods(api, settings.node, log)
    pods.start()
    stack.callback(pods.stop)
    return _Cluster(api, pods, ApiNode(api, pods, settings.node, log, settings.proc), settings.node)


def _decider(cluster: _Cluster | None) -> Decide:
    def decide(request: Request, entry: Entry) -> Decision:
        if entry.kubernetes is not None and cluster is None:
            expected = "the node agent was started without --kube-api, and cannot ask about this pod"
            raise ConfigError([Problem("kubernetes", str(entry.kubernetes), expected)])
        asks = cluster is not None and request.command != "STATUS"
        return pod.decide(request, entry, cluster.pods.lookup if asks and cluster is not None else None)

    return decide


def _closer() -> Callable[[socket.socket], None]:
    """Closes sockets in a thread of its own: no runtime waits for what the kernel still has to do about a deleted table."""
    queue: SimpleQueue[socket.socket] = SimpleQueue()

    def close() -> None:
        while True:
            queue.get().close()

    threading.Thread(target=close, name="close", daemon=True).start()
    return queue.put


def _repeat(work: Callable[[], None]) -> Callable[[], None]:
    """Do `work` every now and then in a thread; what stops it."""
    over = threading.Event()

    def rounds() -> None:
        while not over.wait(EVERY_S):
            try:
                work()
            except Exception:  # noqa: BLE001 - the edge of this thread: one bad round must not end all repair
                log("bug", traceback=traceback.format_exc())

    thread = threading.Thread(target=rounds, name="repair", daemon=True)
    thread.start()

    def stop() -> None:
        over.set()
        thread.join()

    return stop


def _log_exception(what: threading.ExceptHookArgs) -> None:
    log("bug", traceback="".join(traceback.format_exception(what.exc_type, what.exc_value, what.exc_traceback)))


def _told_to_stop() -> int:
    """A descriptor from which a byte can be read once we are told to stop."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(tell, False)
    # Written by whichever thread the kernel gives the signal to. Python's own handlers run in the main thread, and not while
    # that waits: it is interrupted only when it is the one.
    signal.set_wakeup_fd(tell)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    return told


def _raise_descriptor_limit() -> None:
    # One for each pod whose namespace cannot be seen from here, and a few for each request.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _attachments(socket_path: str) -> Attachments:
    folder = os.path.join(os.path.dirname(socket_path), server.ATTACHMENTS)
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
