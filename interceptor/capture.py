"""Enable, disable and check capture in one network namespace: facts, plan, backend.

All that the CLI and the CNI plugin call. Knows no rule and no text of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interceptor import facts, netns
from interceptor.backends import detect, surroundings
from interceptor.backends.base import Backend, Difference, Observed, compare
from interceptor.bpf import places
from interceptor.config import Config, warnings
from interceptor.errors import BackendError, InterceptorError, NetnsError
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts, Plan
from interceptor.values import join

if TYPE_CHECKING:
    from interceptor.backends.connect import Switched

CONNECT, NO_RULES = "connect", "no rule is needed"  # in place of a backend's name, and why


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and the facts that it was built on."""

    plan: Plan
    facts: HostFacts


@dataclass(frozen=True, slots=True)
class Report:
    """What enable() did. `removed`: backends that held old rules of ours, now gone."""

    changed: bool
    backend: str
    reason: str
    removed: tuple[str, ...]
    warnings: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True, slots=True)
class Removed:
    """What disable() did: the backends that held something of ours."""

    changed: bool
    backends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """How the kernel differs from the plan; no differences means equal. `nothing_there`: no rule of ours at all."""

    backend: str
    reason: str
    differences: tuple[Difference, ...]
    nothing_there: bool = False


def prepare(config: Config, *, netns: str | None = None) -> Prepared:
    """The plan for `config`, here or in a namespace. Reads only; needs no privilege without `netns`."""
    with _entered(netns):
        found = facts.look(netns)
        return Prepared(build_plan(config, found), found)


def enable(config: Config, *, netns: str | None = None, allow_host: bool = False) -> Report:
    """Capture as `config` says. Idempotent; read back before it returns.

    Raises NetnsError for the host's own namespace unless `allow_host`, Unsupported, BackendError; then nothing has changed.
    """
    with _to_change(netns, allow_host):
        found = facts.look(netns)
        plan = build_plan(config, found)
        missing = detect.missing_parts(config.backend)
        choice = _choose(config, plan, missing)
        _refuse_out_of_reach(missing)
        surroundings_changed = surroundings.prepare(plan)
        switched = _switch_on(plan, surroundings_changed)
        try:
            changed = choice is not None and _backend(choice.name).apply(plan)
        except InterceptorError:
            if switched is not None:
                switched.undo()
            surroundings_changed.undo()
            raise
        # After the new rules stand: at no moment is nothing captured.
        if switched is not None:
            switched.finish()
            changed = changed or switched.changed
        elif _switch_off():
            changed = True
        removed = tuple(_remove_others(choice.name if choice else None, missing))
        tidied = surroundings.tidy(plan)
        changed = changed or bool(surroundings_changed) or bool(removed) or tidied
        name, reason = (choice.name, choice.reason) if choice else (CONNECT, NO_RULES)
        return Report(changed, name, reason, removed, tuple(_warnings(config, found)), plan)


def disable(*, netns: str | None = None, allow_host: bool = False) -> Removed:
    """Take away all that is ours, whoever wrote it and with whatever configuration. Succeeds when there is nothing."""
    with _to_change(netns, allow_host):
        missing = detect.missing_parts()
        _refuse_out_of_reach(missing)
        removed = (*((CONNECT,) if _switch_off() else ()), *_remove_others(None, missing))
        # Rules first: they may still mark packets for the routes.
        return Removed(surroundings.tidy(None) or bool(removed), removed)


def check(config: Config, *, netns: str | None = None) -> Checked:
    """Compare the kernel with the plan for `config`. Changes nothing."""
    with _entered(netns):
        plan = build_plan(config, facts.look(netns))
        missing = detect.missing_parts(config.backend)
        choice = _choose(config, plan, missing)
        holding = list(_holding(missing))
        if choice and config.backend == "auto" and holding and not any(_same_tables(other, choice.name) for other in holding):
            choice = detect.Choice(holding[0], "it holds rules of ours")
        name = choice.name if choice else None
        observed = _backend(name).observe() if name else Observed({})
        differences = [
            *(compare(_backend(name).expected(plan), observed) if name else ()),
            *_connect_differences(plan),
            *surroundings.differences(plan),
            *(
                Difference("extra", other, "rules of ours in a second backend")
                for other in holding
                if not _same_tables(other, name)
            ),
            *(Difference("extra", other, "rules of ours in a second backend") for other in detect.out_of_reach(missing)),
        ]
        shown = (choice.name, choice.reason) if choice else (CONNECT, NO_RULES)
        return Checked(*shown, tuple(differences), nothing_there=not observed.chains and not _connects())


def _choose(config: Config, plan: Plan, missing: dict[detect.BackendName, str]) -> detect.Choice | None:
    """What writes the rules; None when all capture is at connect(), and no program that writes rules need be there."""
    if plan.connect is not None and not plan.chains:
        return None
    return detect.choose(config.backend, missing, needs_nft=config.proxy_cgroup is not None)


def _switch_on(plan: Plan, prepared: surroundings.Prepared) -> Switched | None:
    """Before the rules: what both capture is captured once, since a rewritten connection stays on loopback."""
    if plan.connect is None:
        return None
    from interceptor.backends import connect  # 20 ms, and for few

    try:
        return connect.switch_on(plan.connect)
    except InterceptorError:
        prepared.undo()
        raise


def _switch_off() -> bool:
    if not os.path.isdir(places.root()):
        return False
    from interceptor.backends import connect

    return connect.switch_off()


def _connect_differences(plan: Plan) -> Iterator[Difference]:
    if plan.connect is not None or os.path.isdir(places.root()):
        from interceptor.backends import connect

        yield from connect.differences(plan.connect)


def _connects() -> bool:
    """Whether something is captured at connect()."""
    if not os.path.isdir(places.root()):
        return False
    from interceptor.backends import connect

    return connect.is_there()


def _entered(namespace: str | None) -> AbstractContextManager[None]:
    return netns.entered(None if namespace is None else netns.locate(namespace))


@contextmanager
def _to_change(namespace: str | None, allow_host: bool) -> Iterator[None]:
    with _entered(namespace):
        guard(allow_host)
        with netns.locked():
            yield


def _refuse_out_of_reach(missing: dict[detect.BackendName, str]) -> None:
    for name in detect.out_of_reach(missing):
        raise BackendError(
            f"{name} holds rules of ours, which can be neither replaced nor removed here: {missing[name]}. Nothing was changed"
        )


def guard(allow_host: bool) -> None:
    """Raises NetnsError in the host's own network namespace, unless `allow_host`."""
    if not allow_host and netns.is_host():
        raise NetnsError(
            "this is the host's own network namespace: rules here capture every program of the machine. "
            "Give --netns NAME|PATH|PID for a pod's, or --host if you mean it"
        )


def _backend(name: detect.BackendName) -> Backend:
    # Each is imported only when chosen; libiptc's costs 350 ms, in a process of its own.
    if name == "nft":
        from interceptor.backends.nft import NftBackend

        return NftBackend()
    if name == "libiptc":
        from interceptor.backends.libiptc import LibiptcBackend

        return LibiptcBackend()
    from interceptor.backends.iptables import IptablesBackend

    return IptablesBackend("nft" if name == "iptables-nft" else "legacy")


def _holding(missing: dict[detect.BackendName, str]) -> Iterator[detect.BackendName]:
    """The usable backends in whose tables something of ours stands. libiptc's and iptables-legacy's tables are the same."""
    for name in detect.NAMES:
        if name in missing or (name == "libiptc" and "iptables-legacy" not in missing):
            continue
        if detect.may_hold(name) and _backend(name).observe().chains:
            yield name


def _remove_others(keep: detect.BackendName | None, missing: dict[detect.BackendName, str]) -> Iterator[str]:
    for name in _holding(missing):
        if not _same_tables(name, keep):
            _backend(name).remove()
            yield name


def _same_tables(name: detect.BackendName, other: detect.BackendName | None) -> bool:
    return name == other or {name, other} == {"iptables-legacy", "libiptc"}


def _warnings(config: Config, found: HostFacts) -> Iterator[str]:
    yield from warnings(config)
    same = facts.processes_of(config.proxy_uid)
    if same:
        yield (
            f"running under the proxy's uid {join(config.proxy_uid)}: {', '.join(same)}; "
            "unless that is the proxy itself, its traffic goes around the proxy"
        )
    if config.dns == "resolv-conf" and not found.resolvers:
        yield "--dns resolv-conf: resolv.conf names no server, so no DNS is captured; --dns all captures any"
    if facts.hides_service_addresses():
        yield (
            "Cilium's socket load balancing rewrites service addresses before any rule sees them: the proxy gets the pod's "
            "address, not the service's. Set socketLB.hostNamespaceOnly=true in Cilium"
        )
