"""Let go of a network namespace: take away all that is ours there, whoever wrote it. Knows no option, and no plan.

Apart from capture.py, and with no more imports than it needs: each pod's end waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from interceptor import netns
from interceptor.backends import at_connect, detect, netlink, surroundings
from interceptor.errors import NetnsError

if TYPE_CHECKING:
    from interceptor.backends.base import Backend


@dataclass(frozen=True, slots=True)
class Removed:
    """What disable() did: the backends that held something of ours."""

    changed: bool
    backends: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def disable(*, netns: str | None = None, allow_host: bool = False) -> Removed:
    """Take away all that is ours, whoever wrote it and with whatever configuration. Succeeds when there is nothing."""
    with to_change(netns, allow_host):
        missing = detect.Missing()
        switched_off = at_connect.switch_off()
        removed, strays = remove_others(None, missing)
        removed = (at_connect.NoRules.name, *removed) if switched_off else removed
        # Rules first: they may still mark packets for the routes.
        return Removed(surroundings.tidy(None) or bool(removed), removed, tuple(about_rules(strays, missing)))


@contextmanager
def entered(namespace: str | None) -> Iterator[None]:
    """In the namespace of that name; None is the one we are in. What netlink lists there is listed once."""
    with netns.entered(None if namespace is None else netns.locate(namespace)), netlink.kept():
        yield


@contextmanager
def to_change(namespace: str | None, allow_host: bool) -> Iterator[None]:
    """The same, guarded, and while no other process of ours changes it."""
    with entered(namespace):
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


def backend(name: detect.BackendName) -> Backend:
    """The backend of that name."""
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


def holding(missing: Mapping[detect.BackendName, str], keep: detect.BackendName | None) -> Iterator[detect.BackendName]:
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
        if name == "nft" or backend(name).observe().chains:
            yield name


def remove_others(
    keep: detect.BackendName | None, missing: Mapping[detect.BackendName, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove what other backends than `keep` hold: their names, and the strays that went with them."""
    names: list[str] = []
    strays: list[str] = []
    for name in (*holding(missing, keep), *detect.orphaned(missing)):
        if name == "iptables-nft" and name in missing:
            from interceptor.backends import orphans  # hardly ever needed

            strays += orphans.remove()
        else:
            other = backend(name)
            other.remove()
            strays += other.strays
        names.append(name)
    return tuple(names), tuple(strays)


def about_rules(strays: Iterable[str], missing: Mapping[detect.BackendName, str]) -> Iterator[str]:
    """Warnings: of rules that went along, and of what nobody here can look into."""
    for stray in strays:
        yield f"removed a rule that was not ours but led into our chains: {stray}"
    if detect.unreadable(missing):
        yield (
            "there are iptables-legacy tables here and no program to look into them: rules of ours that may be there stay. "
            "Install iptables (iptables-legacy) or python-iptables, and run this again"
        )


def _same_tables(name: detect.BackendName, other: detect.BackendName | None) -> bool:
    return name == other or {name, other} == {"iptables-legacy", "libiptc"}
