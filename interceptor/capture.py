"""Enable, disable and check capture in one network namespace: facts, plan, backend.

All that the CLI and the CNI plugin call. Knows no rule and no text of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from interceptor import facts, release
from interceptor.backends import announced as noting
from interceptor.backends import at_connect, detect, surroundings
from interceptor.backends.base import Difference, NotConfirmed, Observed, compare
from interceptor.config import Config, warnings
from interceptor.errors import BackendError, InterceptorError
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts, Plan
from interceptor.release import Removed, disable, guard
from interceptor.values import Network, join, parse_cidrs

__all__ = [
    "Checked",
    "Prepared",
    "Removed",
    "Report",
    "announced",
    "check",
    "disable",
    "enable",
    "fingerprint",
    "going_around",
    "guard",
    "prepare",
    "usable",
]


STANDS = "The new rules stand; what was there before may not all be gone: run the same command again, or clean"


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
class Checked:
    """How the kernel differs from the plan; no differences means equal. `nothing_there`: no rule of ours at all.

    `announced`: with --before-proxy bypass, whether the proxy has announced itself; else None.
    """

    backend: str
    reason: str
    differences: tuple[Difference, ...]
    nothing_there: bool = False
    announced: bool | None = None


def prepare(config: Config, *, netns: str | None = None, resolvers: Sequence[str] | None = None) -> Prepared:
    """The plan for `config`, here or in a namespace. Reads only; needs no privilege without `netns`.

    `resolvers` are the name servers that the namespace's resolv.conf will name, where that is not written yet.
    """
    with release.entered(netns):
        found = _look_at_all(netns, resolvers)
        return Prepared(build_plan(config, found), found)


def usable(config: Config) -> str:
    """The backend that enable() would use, judged by what is installed and mounted here, whatever the namespace is.

    Not by a cgroup that `config` names: it may be a pod that makes it. Raises ConfigError, Unsupported, BackendError.
    """
    if config.outbound == "connect":
        at_connect.require()
    return detect.choose(config.backend, detect.Missing(config.backend), needs_nft=config.proxy_cgroup is not None).name


def enable(
    config: Config,
    *,
    netns: str | None = None,
    allow_host: bool = False,
    resolvers: Sequence[str] | None = None,
    had_rules: bool = False,
) -> Report:
    """Capture as `config` says. Idempotent; read back before it returns. `resolvers` as for prepare().

    `had_rules`: there were rules here, though they may be lost. What was captured is never let go again: `--before-proxy
    bypass` opens only where there were none, and what its rules have noted is kept.

    Raises NetnsError for the host's own namespace unless `allow_host`, Unsupported, BackendError. Then nothing has changed,
    unless the text says that the new rules stand or the old ones are gone.
    """
    with release.to_change(netns, allow_host):
        found = _look(config, netns, resolvers)
        plan = _build(config, found)
        missing = detect.Missing(config.backend)
        if plan.waiting:
            plan = replace(plan, announced=_has_announced(missing, had_rules))
        choice = _choose(config, plan, missing)
        backend = release.backend(choice.name)
        surroundings_changed = surroundings.prepare(plan)
        switched = None
        try:
            switched = at_connect.switch_on(plan)
            changed = backend.apply(plan)
        except NotConfirmed:
            # The new rules, which stand, need what is around them.
            if switched is not None:
                switched.finish()
            raise
        except Exception:  # also what no backend foresaw, as EMFILE
            if switched is not None:
                switched.undo()
            surroundings_changed.undo()
            raise
        # After the new rules stand: at no moment is nothing captured.
        try:
            changed = at_connect.settle(plan, switched) or changed
            removed, strays = release.remove_others(choice.name, missing)
            changed = surroundings.tidy(plan) or changed
        except (InterceptorError, OSError) as error:
            raise BackendError(f"{error}. {STANDS}") from error
        changed = changed or bool(surroundings_changed) or bool(removed)
        said = (*release.about_rules((*backend.strays, *strays), missing), *_warnings(config, found))
        return Report(changed, choice.name, choice.reason, removed, said, plan)


def check(config: Config, *, netns: str | None = None, resolvers: Sequence[str] | None = None) -> Checked:
    """Compare the kernel with the plan for `config`. Changes nothing. `resolvers` as for prepare()."""
    with release.entered(netns):
        plan = _build(config, _look(config, netns, resolvers))
        missing = detect.Missing(config.backend)
        choice = _choose(config, plan, missing)
        name, reason = choice.name, choice.reason
        backend = release.backend(name)
        held = backend.holds(plan)
        observed = Observed({}) if held else backend.observe()
        others = [*release.holding(missing, name), *detect.orphaned(missing)]
        usable = [other for other in others if other not in missing]
        if config.backend == "auto" and not held and not observed.chains and usable:
            name, reason = usable[0], "it holds rules of ours"
            others.remove(name)
            backend = release.backend(name)
            observed = backend.observe()
        differences = (
            *(() if held else compare(backend.expected(plan), observed)),
            *at_connect.differences(plan),
            *surroundings.differences(plan),
            *(Difference("extra", other, "rules of ours in a second backend") for other in others),
        )
        nothing = not (plan.chains if held else observed.chains) and not at_connect.stands()
        return Checked(name, reason, differences, nothing_there=nothing, announced=announced(plan))


def going_around(config: Config, *, netns: str | None = None) -> list[str]:
    """Warnings of processes that run there as the proxy does. Looks at each process: not for a pod that is being made."""
    with release.entered(netns):
        same = facts.processes_of(config.proxy_uid)
    if not same:
        return []
    return [
        f"running under the proxy's uid {join(config.proxy_uid)}: {', '.join(same)}; "
        "unless that is the proxy itself, its traffic goes around the proxy"
    ]


def announced(plan: Plan) -> bool | None:
    """Whether the proxy has announced itself here, in all families that wait; None where `plan` does not wait for it.

    In the current namespace.
    """
    return plan.waiting <= (noting.noted() or frozenset()) if plan.waiting else None


def fingerprint(*, netns: str | None = None) -> tuple[object, ...] | None:
    """Changes whenever something that check() tells of may have changed; costs a few messages and no program.

    None where nothing tells cheaply: then only check() does.
    """
    with release.entered(netns):
        generation = detect.generation()
        return None if generation is None else (generation, noting.noted(), at_connect.stands(), *surroundings.state())


def _has_announced(missing: Mapping[detect.BackendName, str], had_rules: bool) -> bool:
    noted = noting.noted()
    if noted is not None:
        return bool(noted)
    return had_rules or at_connect.stands() or any(release.holding(missing, None))


def _look(config: Config, namespace: str | None, resolvers: Sequence[str] | None) -> HostFacts:
    if config.outbound == "connect":
        return _look_at_all(namespace, resolvers)
    given: tuple[Network, ...] = ()
    if config.dns == "resolv-conf":
        given = facts.resolvers(facts.resolv_conf_path(namespace)) if resolvers is None else _networks(resolvers)
    return replace(facts.look_for_rules(given), earlier_routes=surroundings.standing_routes())


def _look_at_all(namespace: str | None, resolvers: Sequence[str] | None) -> HostFacts:
    found = replace(facts.look(namespace), earlier_routes=surroundings.standing_routes())
    return found if resolvers is None else replace(found, resolvers=_networks(resolvers))


def _networks(addresses: Sequence[str]) -> tuple[Network, ...]:
    return parse_cidrs(",".join(addresses)) if addresses else ()


# An agent is asked for the same in pod after pod.
_build = lru_cache(64)(build_plan)


def _choose(config: Config, plan: Plan, missing: Mapping[detect.BackendName, str]) -> detect.Choice:
    if plan.connect is not None and not plan.chains:
        return detect.Choice("connect", "no rule is needed")
    return detect.choose(config.backend, missing, needs_nft=config.proxy_cgroup is not None)


def _warnings(config: Config, found: HostFacts) -> Iterator[str]:
    yield from warnings(config)
    if config.dns == "resolv-conf" and not found.resolvers:
        yield "--dns resolv-conf: resolv.conf names no server, so no DNS is captured; --dns all captures any"
    if facts.hides_service_addresses():
        yield (
            "Cilium's socket load balancing rewrites service addresses before any rule sees them: the proxy gets the pod's "
            "address, not the service's. Set socketLB.hostNamespaceOnly=true in Cilium"
        )
