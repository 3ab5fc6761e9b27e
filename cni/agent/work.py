"""What the agent does with one request: the plugin's work in this process, then counted, logged and remembered."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping

from cni import plugin, protocol, wire
from cni.agent.attachments import Attachment, Attachments, Key, State
from cni.agent.log import log
from cni.agent.metrics import Metrics
from cni.agent.server import Answer, Received
from cni.entry import Entry
from cni.ops import InProcess
from cni.output import to_bytes
from cni.pod import Capture, Decision
from cni.protocol import Request

Decide = Callable[[Request, Entry], Decision]


class AgentOps(InProcess):
    """InProcess for one request, whose decision may need the API and is kept for the log."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self.decision: Decision | None = None
        self.network = ""
        self.state: State = "skipped"

    def decide(self, request: Request, entry: Entry) -> Decision:
        """See Ops."""
        self.network = request.config["name"]
        self.decision = self._decide(request, entry)
        return self.decision

    def enable(self, request: Request, wanted: Capture) -> Iterable[str]:
        """See Ops."""
        self.state = "drifted"  # where it fails, and the entry lets the pod start: repair will try again
        warnings = super().enable(request, wanted)
        self.state = "captured"
        return warnings


class Worker:
    """Answers requests, from any thread."""

    def __init__(self, attachments: Attachments, metrics: Metrics, decide: Decide) -> None:
        self._attachments = attachments
        self._metrics = metrics
        self._decide = decide

    def answer(self, received: Received) -> Answer:
        """Carry out one request."""
        started = time.monotonic()
        environment = dict(received.environment)
        command = environment.get("CNI_COMMAND", "")
        given = environment.get("CNI_NETNS", "")
        # What is no descriptor is nothing to us: a path of the host's may lead elsewhere here.
        environment["CNI_NETNS"] = f"/proc/self/fd/{received.netns}" if received.netns >= 0 else ""
        if command == "DEL":
            # First: from now on nobody heals what is being taken away.
            self._forget(received)
        said: list[str] = []
        ops = AgentOps(self._decide)
        status, result = plugin.process(environment, received.stdin, ops, said.append)
        try:
            self._remember(received, status, ops)
        except OSError as error:
            # The pod is as it was asked for; what suffers is its repair.
            log("not_remembered", container=environment.get("CNI_CONTAINERID", ""), error=str(error))
        code = int(result["code"]) if status and result else 0
        seconds = time.monotonic() - started
        self._metrics.request(command, code, seconds)
        _tell(received.environment, result if status else None, ops.decision, said, seconds)
        if status and result:
            # The runtime, and whoever reads its log, knows the path and not our number for it.
            result = {key: _with_path(value, environment["CNI_NETNS"], given) for key, value in result.items()}
        return status, to_bytes(result), wire.told(said)

    def _remember(self, received: Received, status: int, ops: AgentOps) -> None:
        environment = received.environment
        match environment.get("CNI_COMMAND"):
            case "ADD" if status == 0 and received.netns >= 0 and ops.decision is not None:
                found = os.fstat(received.netns)
                attachment = Attachment(
                    _key(environment),
                    environment.get("CNI_NETNS", ""),
                    (found.st_dev, found.st_ino),
                    received.netns,
                    ops.state,
                    pod_name(environment),
                    ops.network,
                )
                self._attachments.put(attachment, ops.decision)
            case "GC" if status == 0:
                self._collect(received.stdin)

    def _forget(self, received: Received) -> None:
        key = _key(received.environment)
        if "/" in "".join(key):
            return
        try:
            self._attachments.forget(key)
        except OSError as error:
            # A name too long, or a directory that is read-only now: the pod's rules go all the same.
            log("not_forgotten", container=key[0], error=str(error))

    def _collect(self, stdin: bytes) -> None:
        request = protocol.parse({"CNI_COMMAND": "GC"}, stdin)
        # Both names hold the same list (containernetworking/cni#1101); without either, nothing is said to be gone.
        for name in ("cni.dev/valid-attachments", "cni.dev/attachments"):
            valid = request.config.get(name)
            if isinstance(valid, list):
                keys = [key for each in valid if (key := _listed(each)) is not None]
                # Nor is it by a list that is not understood.
                if len(keys) == len(valid):
                    self._attachments.keep_only(request.config["name"], keys)
                return


def _listed(attachment: object) -> Key | None:
    if not isinstance(attachment, dict):
        return None
    container, ifname = attachment.get("containerID"), attachment.get("ifname")
    return (container, ifname) if isinstance(container, str) and isinstance(ifname, str) else None


def _key(environment: Mapping[str, str]) -> Key:
    return environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")


def pod_name(environment: Mapping[str, str]) -> str:
    """namespace/name of the pod that CNI_ARGS name; empty when they name none."""
    arguments = dict(item.partition("=")[::2] for item in environment.get("CNI_ARGS", "").split(";"))
    namespace, name = arguments.get("K8S_POD_NAMESPACE"), arguments.get("K8S_POD_NAME")
    return f"{namespace}/{name}" if namespace and name else ""


def _with_path(value: object, ours: str, given: str) -> object:
    return value.replace(ours, given) if isinstance(value, str) and ours else value


def _tell(
    environment: Mapping[str, str],
    error: Mapping[str, object] | None,
    decision: Decision | None,
    said: list[str],
    seconds: float,
) -> None:
    fields: dict[str, object] = {
        "command": environment.get("CNI_COMMAND", ""),
        "container": environment.get("CNI_CONTAINERID", ""),
        "pod": pod_name(environment) or None,
        "ms": round(seconds * 1000, 1),
    }
    if decision is not None:
        fields |= {"decision": type(decision).__name__.lower(), "reason": decision.reason}
    if said:
        fields["said"] = said
    if error is not None:
        fields |= {"code": error["code"], "error": error["msg"], "details": error.get("details", "")}
    log("request", **fields)
