"""Find the pods of this node that should be captured and are not, and do something about it. Knows no rule.

Two kinds: those that an ADD was seen for, and which lost their rules since; and those that were there before the plugin, which
only the API tells of. The kernel is asked for a pod's rules only when its fingerprint has changed since they were right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from cni import entry, pod, protocol
from cni.agent.attachments import Attachment, Attachments
from cni.agent.metrics import Metrics
from cni.entry import Entry
from cni.kube.pods import KnownPod
from cni.ops import resolvers_for
from cni.pod import Capture, Decision
from cni.protocol import CniError, Request
from interceptor import capture
from interceptor.errors import InterceptorError

Mode: TypeAlias = Literal["heal", "label", "delete", "off"]
# A pod without rules is unprotected: healed within 5 s of the loss. A round costs 0.3 ms of processor time for each pod whose
# rules are untouched.
EVERY_S = 2.0
# A pod that was captured a moment ago is not compared yet: its runtime waits for us, and others' ADDs are likely under way.
YOUNG_S = 1.0
# What could not be repaired is tried again, and told again, no more often.
RETRY_S = 30.0
TOLD_AGAIN_S = 60.0
# One pod, then the next: whatever is wrong, it must not empty a node at once.
DELETE_EVERY_S = 10.0

Decide: TypeAlias = Callable[[Request, Entry], Decision]


class Node(Protocol):
    """What the API and /proc tell about this node's pods."""

    def unseen(self, seen: Sequence[str]) -> Iterator[Found]:
        """Pods that run here, beside those with the uids or the namespace/names in `seen`, with their namespaces."""

    def known(self, name: str) -> KnownPod | None:
        """The pod with this namespace/name."""

    def label(self, known: KnownPod) -> None:
        """Mark it."""

    def delete(self, known: KnownPod) -> None:
        """Delete it."""

    def tell(self, known: KnownPod, reason: str, message: str) -> None:
        """Write an event."""


@dataclass(frozen=True, slots=True)
class Found:
    """A pod that no ADD was seen for: the way to its namespace, and what its resolv.conf says."""

    known: KnownPod
    way: str
    resolvers: tuple[str, ...]


@dataclass(slots=True)
class _Looked:
    """What is remembered of a pod between rounds. `good`: its fingerprint when its rules were right."""

    good: tuple[object, ...] | None = None
    not_before: float = 0.0
    told: float = field(default=-TOLD_AGAIN_S)


@dataclass(frozen=True, slots=True)
class _Target:
    """One pod whose rules are compared."""

    id: object
    name: str
    way: str
    decide: Callable[[], Decision]
    attachment: Attachment | None = None
    known: KnownPod | None = None


class Repairer:
    """Does rounds. Not for several threads at once."""

    def __init__(
        self,
        mode: Mode,
        attachments: Attachments,
        metrics: Metrics,
        decide: Decide,
        log: Callable[..., None],
        node: Node | None = None,
        configured: Entry | None = None,
    ) -> None:
        self._mode = mode
        self._attachments = attachments
        self._metrics = metrics
        self._decide = decide
        self._log = log
        self._node = node
        self._configured = configured
        self._looked: dict[object, _Looked] = {}
        self._next_delete = 0.0

    def round(self) -> None:
        """Compare every pod, and repair."""
        targets = list(self._targets())
        for target in targets:
            looked = self._looked.setdefault(target.id, _Looked())
            if looked.not_before > time.monotonic():
                continue
            try:
                self._look(target, looked)
            except (InterceptorError, CniError) as error:
                looked.not_before = time.monotonic() + RETRY_S
                if target.attachment is not None and target.attachment.way is None:
                    continue  # it went while it was looked at
                self._failed(target, looked, str(error))
        self._looked = {target.id: self._looked[target.id] for target in targets}

    def _targets(self) -> Iterator[_Target]:
        seen = []
        for attachment in self._attachments.all():
            if attachment.pod:
                seen.append(attachment.pod)
            way = attachment.way
            is_young = attachment.since + YOUNG_S > time.monotonic()
            if way is not None and attachment.state != "skipped" and not is_young:
                yield self._attached(attachment, way)
        if self._node is None or self._configured is None:
            return
        for found in self._node.unseen(seen):
            yield self._predating(found, self._configured)

    def _attached(self, attachment: Attachment, way: str) -> _Target:
        def decide() -> Decision:
            return self._attachments.wanted(attachment.key) or pod.Skip("deleted meanwhile")

        known = self._node.known(attachment.pod) if self._node is not None and attachment.pod else None
        return _Target(attachment.key, attachment.pod or attachment.key[0], way, decide, attachment, known)

    def _predating(self, found: Found, configured: Entry) -> _Target:
        view = found.known.view

        def decide() -> Decision:
            args = {"K8S_POD_NAMESPACE": view.namespace, "K8S_POD_NAME": view.name, "K8S_POD_UID": view.uid}
            previous = {"prevResult": {"ips": [{"address": ip} for ip in view.ips]}}
            decided = self._decide(Request("CHECK", args=args, config=previous), configured)
            return Capture(decided.config, found.resolvers, decided.reason) if isinstance(decided, Capture) else decided

        return _Target(view.uid, f"{view.namespace}/{view.name}", found.way, decide, known=found.known)

    def _look(self, target: _Target, looked: _Looked) -> None:
        before = capture.fingerprint(netns=target.way)
        if before is not None and before == looked.good:
            return
        decision = target.decide()
        if not isinstance(decision, Capture):
            looked.good = before
            return
        resolvers = resolvers_for(decision)
        checked = capture.check(decision.config, netns=target.way, resolvers=resolvers)
        if not checked.differences:
            looked.good = before
            self._set_state(target, "early" if checked.announced is False else "captured")
            return
        self._set_state(target, "drifted")
        shown = [str(difference) for difference in checked.differences[:5]]
        self._log("drifted", pod=target.name, differences=len(checked.differences), first=shown, mode=self._mode)
        self._repair(target, looked, decision, resolvers)

    def _repair(self, target: _Target, looked: _Looked, decision: Capture, resolvers: tuple[str, ...]) -> None:
        if self._mode == "heal":
            plan = capture.enable(decision.config, netns=target.way, resolvers=resolvers, had_rules=True).plan
            if target.attachment is not None and not self._attachments.holds(target.attachment.key):
                # A DEL came between: it has taken its rules away, perhaps before these were written.
                capture.disable(netns=target.way)
                return
            looked.good = capture.fingerprint(netns=target.way)
            self._set_state(target, "early" if plan.waiting and not plan.announced else "captured")
            self._done(target, looked, "healed", "CaptureHealed", "its capture rules were missing or changed; written again")
            return
        looked.not_before = time.monotonic() + RETRY_S
        if self._node is None or target.known is None:
            raise CniError(protocol.NOT_AVAILABLE, f"--repair {self._mode}", "the API does not know this pod")
        if self._mode == "label":
            self._node.label(target.known)
            self._done(target, looked, "labelled", "CaptureMissing", "its traffic is not captured as it should be")
        elif self._next_delete > time.monotonic():
            looked.not_before = self._next_delete
        else:
            self._next_delete = time.monotonic() + DELETE_EVERY_S
            self._done(
                target, looked, "deleted", "CaptureMissing", "deleted, since its traffic is not captured as it should be"
            )
            self._node.delete(target.known)

    def _set_state(self, target: _Target, state: Literal["captured", "drifted", "early"]) -> None:
        if target.attachment is not None:
            target.attachment.state = state

    def _done(self, target: _Target, looked: _Looked, result: str, reason: str, message: str) -> None:
        self._metrics.repair(result)
        self._log(result, pod=target.name)
        self._tell(target, looked, reason, message)

    def _failed(self, target: _Target, looked: _Looked, why: str) -> None:
        self._metrics.repair("failed")
        self._log("not_repaired", pod=target.name, error=why)
        self._tell(target, looked, "CaptureFailed", why)

    def _tell(self, target: _Target, looked: _Looked, reason: str, message: str) -> None:
        if self._node is None or target.known is None or looked.told + TOLD_AGAIN_S > time.monotonic():
            return
        looked.told = time.monotonic()
        self._node.tell(target.known, reason, message)


def configured_entry(found: Any) -> Entry:
    """Our entry in a conflist, or the entry alone, as it was read from JSON. Raises CniError."""
    plugins = found.get("plugins") if isinstance(found, dict) else None
    if isinstance(plugins, list):
        found = next((each for each in plugins if isinstance(each, dict) and each.get("type") == "interceptor-cni"), None)
    if not isinstance(found, dict):
        raise CniError(protocol.INVALID_CONFIG, "there is no entry of type interceptor-cni")
    return entry.read(found)
