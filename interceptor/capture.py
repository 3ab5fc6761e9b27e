"""Enable, disable and check capture in one network namespace: facts, plan, backend.

All that the CLI and the CNI plugin call. Knows no rule and no text of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from interceptor import facts, netns
from interceptor.backends import announced as noting
from interceptor.backends import at_connect, detect, netlink, surroundings
from interceptor.backends.base import Backend, Difference, Observed, compare
from interceptor.config import Config, warnings
from interceptor.errors import InterceptorError, NetnsError
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts, Plan
from interceptor.values import Network, join, parse_cidrs


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
    warnings: tuple[str, ...] = ()


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
    with _entered(netns):
        found = _look_at_all(netns, resolvers)
        return Prepared(build_plan(config, found), found)


def usable(config: Config) -> str:
    """The backend that enable() would use, judged by what is installed here. Raises ConfigError, BackendError."""
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

    Raises NetnsError for the host's own namespace unless `allow_host`, Unsupported, BackendError; then nothing has changed.
    """
    with _to_change(netns, allow_host):
        found = _look(config, netns, resolvers)
        plan = _build(config, found)
        missing = detect.Missing(config.backend)
        if plan.waiting:
            plan = replace(plan, announced=_has_announced(missing, had_rules))
        choice = _choose(config, plan, missing)
        surroundings_changed = surroundings.prepare(plan)
        backend = _backend(choice.name)
        switched = None
        try:
            switched = at_connect.switch_on(plan)
            changed = backend.apply(plan)
        except InterceptorError:
            if switched is not None:
                switched.undo()
            surroundings_changed.undo()
            raise
        # After the new rules stand: at no moment is nothing captured.
        changed = at_connect.settle(plan, switched) or changed
        removed, strays = _remove_others(choice.name, missing)
        tidied = surroundings.tidy(plan)
        changed = changed or bool(surroundings_changed) or bool(removed) or tidied
        said = (*_about_rules((*backend.strays, *strays), missing), *_warnings(config, found))
        return Report(changed, choice.name, choice.reason, removed, said, plan)


def disable(*, netns: str | None = None, allow_host: bool = False) -> Removed:
    """Take away all that is ours, whoever wrote it and with whatever configuration. Succeeds when there is nothing."""
    with _to_change(netns, allow_host):
        missing = detect.Missing()
        switched_off = at_connect.switch_off()
        removed, strays = _remove_others(None, missing)
        removed = (at_connect.NoRules.name, *removed) if switched_off else removed
        # Rules first: they may still mark packets for the routes.
        return Removed(surroundings.tidy(None) or bool(removed), removed, tuple(_about_rules(strays, missing)))


def check(config: Config, *, netns: str | None = None, resolvers: Sequence[str] | None = None) -> Checked:
    """Compare the kernel with the plan for `config`. Changes nothing. `resolvers` as for prepare()."""
    with _entered(netns):
        plan = _build(config, _look(config, netns, resolvers))
        missing = detect.Missing(config.backend)
        choice = _choose(config, plan, missing)
        name, reason = choice.name, choice.reason
        backend = _backend(name)
        held = backend.holds(plan)
        observed = Observed({}) if held else backend.observe()
        others = [*_holding(missing, name), *detect.orphaned(missing)]
        usable = [other for other in others if other not in missing]
        if config.backend == "auto" and not held and not observed.chains and usable:
            name, reason = usable[0], "it holds rules of ours"
            others.remove(name)
            backend = _backend(name)
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
    with _entered(netns):
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
    with _entered(netns):
        generation = detect.generation()
        return None if generation is None else (generation, noting.noted(), at_connect.stands(), *surroundings.state())


def _has_announced(missing: Mapping[detect.BackendName, str], had_rules: bool) -> bool:
    noted = noting.noted()
    if noted is not None:
        return bool(noted)
    return had_rules or at_connect.stands() or any(_holding(missing, None))


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


@contextmanager
def _entered(namespace: str | None) -> Iterator[None]:
    with netns.entered(None if namespace is None else netns.locate(namespace)), netlink.kept():
        yield


@contextmanager
def _to_change(namespace: str | None, allow_host: bool) -> Iterator[None]:
    with _entered(namespace):
        guard(allow_host)
        with netns.locked():
            yield


def guard(allow_host: bool) -> None:
    """Raises NetnsError in the host's own network namespace, unless `allow_host`."""
    if not allow_host and netns.is_host():
        raise NetnsError(
            "this is the host's own network namespace: rules here capture every program of the machine. "
            "Give --netns NAME|PATH|PID for a pod's, or --host if you mean it"
        )


def _choose(config: Config, plan: Plan, missing: Mapping[detect.BackendName, str]) -> detect.Choice:
    if plan.connect is not None and not plan.chains:
        return detect.Choice("connect", "no rule is needed")
    return detect.choose(config.backend, missing, needs_nft=config.proxy_cgroup is not None)


def _backend(name: detect.BackendName) -> Backend:
    # Each is imported only when chosen; libiptc's costs 0.1 s a family, in processes of its own.
    if name == "connect":
        return at_connect.NoRules()
    if name == "nft":
        from interceptor.backends.nft import NftBackend

        return NftBackend()
    if name == "libiptc":
        from interceptor.backends.libiptc import LibiptcBackend

        return LibiptcBackend()
    from interceptor.backends.iptables import IptablesBackend

    return IptablesBackend("nft" if name == "iptables-nft" else "legacy")


def _holding(missing: Mapping[detect.BackendName, str], keep: detect.BackendName | None) -> Iterator[detect.BackendName]:
    """The usable backends, but `keep`, in whose tables something of ours stands."""
    may_hold = cache(detect.may_hold)
    for name in detect.NAMES:
        # Seldom is there anything: programs are looked for only then.
        if _same_tables(name, keep) or not may_hold("iptables-legacy" if name == "libiptc" else name) or name in missing:
            continue
        # libiptc's and iptables-legacy's tables are the same.
        if name == "libiptc" and "iptables-legacy" not in missing:
            continue
        # A table of ours is ours whatever is in it: no program is started to look.
        if name == "nft" or _backend(name).observe().chains:
            yield name


def _remove_others(
    keep: detect.BackendName | None, missing: Mapping[detect.BackendName, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove what other backends than `keep` hold: their names, and the strays that went with them."""
    names: list[str] = []
    strays: list[str] = []
    for name in (*_holding(missing, keep), *detect.orphaned(missing)):
        if name == "iptables-nft" and name in missing:
            from interceptor.backends import orphans  # hardly ever needed

            strays += orphans.remove()
        else:
            backend = _backend(name)
            backend.remove()
            strays += backend.strays
        names.append(name)
    return tuple(names), tuple(strays)


def _about_rules(strays: Iterable[str], missing: Mapping[detect.BackendName, str]) -> Iterator[str]:
    for stray in strays:
        yield f"removed a rule that was not ours but led into our chains: {stray}"
    if detect.unreadable(missing):
        yield (
            "there are iptables-legacy tables here and no program to look into them: rules of ours that may be there stay. "
            "Install iptables (iptables-legacy) or python-iptables, and run this again"
        )


def _same_tables(name: detect.BackendName, other: detect.BackendName | None) -> bool:
    return name == other or {name, other} == {"iptables-legacy", "libiptc"}


def _warnings(config: Config, found: HostFacts) -> Iterator[str]:
    yield from warnings(config)
    if config.dns == "resolv-conf" and not found.resolvers:
        yield "--dns resolv-conf: resolv.conf names no server, so no DNS is captured; --dns all captures any"
    if facts.hides_service_addresses():
        yield (
            "Cilium's socket load balancing rewrites service addresses before any rule sees them: the proxy gets the pod's "
            "address, not the service's. Set socketLB.hostNamespaceOnly=true in Cilium"
        )
