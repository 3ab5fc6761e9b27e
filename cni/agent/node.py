"""This node's pods for repair: the API's cache and changes, and the way to each pod's namespace through /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from cni.kube import actions
from cni.kube.api import Api, ApiError
from cni.kube.pods import KnownPod, Pods
from cni.repair import Found
from interceptor import facts, netns
from interceptor.errors import NetnsError

SCAN_EVERY_S = 10.0


class ApiNode:
    """`proc`: where the host's processes are seen (its own /proc, or a mount of it)."""

    def __init__(self, api: Api, pods: Pods, name: str, log: Callable[..., None], proc: str = "/proc") -> None:
        self._api = api
        self._pods = pods
        self._name = name
        self._log = log
        self._proc = proc
        self._ways: dict[str, str] = {}
        self._missing: set[str] = set()
        self._next_scan = 0.0

    def unseen(self, seen: Sequence[str]) -> Iterator[Found]:
        """See repair.Node."""
        wanted = {
            known.view.uid: known
            for known in self._pods.all()
            if known.runs and known.view.uid and known.view.ips and not known.view.host_network
        }
        names = set(seen)
        wanted = {uid: each for uid, each in wanted.items() if f"{each.view.namespace}/{each.view.name}" not in names}
        self._ways = {uid: way for uid, way in self._ways.items() if uid in wanted and os.path.exists(way)}
        missing = {uid for uid in wanted if uid not in self._ways}
        # A pod may have no process for long, and there may be thousands of others to look at.
        if missing and (missing != self._missing or self._next_scan <= time.monotonic()):
            self._missing, self._next_scan = missing, time.monotonic() + SCAN_EVERY_S
            self._ways |= find_namespaces({uid: wanted[uid].view.ips for uid in missing}, self._proc)
        for uid, way in self._ways.items():
            pid = way.removeprefix(self._proc + "/").partition("/")[0]
            servers = facts.resolvers(f"{self._proc}/{pid}/root{facts.RESOLV_CONF}")
            yield Found(wanted[uid], way, tuple(str(server.network_address) for server in servers))

    def known(self, name: str) -> KnownPod | None:
        """See repair.Node."""
        return next((each for each in self._pods.all() if f"{each.view.namespace}/{each.view.name}" == name), None)

    def label(self, known: KnownPod) -> None:
        """See repair.Node."""
        self._try(lambda: actions.label(self._api, known.view))

    def delete(self, known: KnownPod) -> None:
        """See repair.Node."""
        self._try(lambda: actions.delete(self._api, known))

    def tell(self, known: KnownPod, reason: str, message: str) -> None:
        """See repair.Node."""
        kind = "Normal" if reason == "CaptureHealed" else "Warning"
        self._try(lambda: actions.event(self._api, known.view, self._name, reason, message, kind))  # type: ignore[arg-type]

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ApiError as error:
            self._log("api", error=str(error))


def find_namespaces(wanted: Mapping[str, Sequence[str]], proc: str = "/proc") -> dict[str, str]:
    """Pod uid -> path of its network namespace, for those of `wanted` (uid -> the pod's addresses) that have processes.

    By the process's cgroup, which names the pod's uid. The namespace must hold one of the pod's addresses: a process of a
    pod may be elsewhere, in the host's namespace above all (istio#55139).
    """
    spelled = {form: uid for uid in wanted for form in (f"pod{uid}", f"pod{uid.replace('-', '_')}")}
    found: dict[str, str] = {}
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        uid = _pod_of(f"{proc}/{name}/cgroup", spelled)
        if uid is None or uid in found:
            continue
        way = f"{proc}/{name}/ns/net"
        with suppress(NetnsError):
            if _is_the_pods(way, wanted[uid]):
                found[uid] = way
    return found


def _pod_of(path: str, spelled: Mapping[str, str]) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(8192)
    except OSError:
        return None
    # /kubepods/burstable/podUID/ID, or kubepods-burstable-podUID_WITH_UNDERSCORES.slice/cri-containerd-ID.scope
    parts = {part.removesuffix(".slice").rpartition("-pod")[2] for part in text.replace("\n", "/").split("/")}
    for part in parts:
        for form in (part, f"pod{part}"):
            if form in spelled:
                return spelled[form]
    return None


def _is_the_pods(way: str, addresses: Sequence[str]) -> bool:
    with netns.entered(way):
        return not netns.is_host() and not {str(address) for address in facts.local_addresses()}.isdisjoint(addresses)
