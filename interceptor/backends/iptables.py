"""The iptables backends: a Tool saves and restores text, this decides what, in which order, and what to do when it fails.

What the rules say is render/iptables.py's business; how capture moves without a leak, render/iptables_switch.py's. Tools are
the programs of the two variants, here, and libiptc.py.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from interceptor.backends import announced, builtin_chains, cttimeout, process, xtables_lock
from interceptor.backends.base import Observed, compare
from interceptor.errors import BackendError, InterceptorError, Unsupported
from interceptor.plan.model import TIMEOUTS, Plan, timeout_name
from interceptor.render import iptables, iptables_save
from interceptor.render.iptables_save import TableRules
from interceptor.render.iptables_switch import same, switch
from interceptor.values import Family

Variant = Literal["nft", "legacy"]
Tables = Mapping[str, TableRules]
# kube-proxy holds the lock for seconds on big nodes; Istio waits 30 s, too.
LOCK_WAIT_S = 30
HAS_V6 = "/proc/thread-self/net/if_inet6"


class Tool(Protocol):
    """Reads and writes one IP family's tables, in the network namespace of the calling thread. Raises BackendError."""

    def opened(self) -> AbstractContextManager[None]:
        """What several calls share lives within this; it may be entered again inside."""

    def save(self, family: Family) -> str:
        """iptables-save text; changes nothing, creates no table."""

    def restore(self, family: Family, text: str) -> None:
        """Do what iptables-restore --noflush does: each table's part in one transaction."""

    def tidy(self, family: Family) -> bool:
        """Take away what restore() made besides rules and nobody needs now; whether there was any."""


@dataclass(frozen=True, slots=True)
class Programs:
    """The Tool that runs iptables-<variant>-save and -restore."""

    variant: Variant

    def opened(self) -> AbstractContextManager[None]:
        """See Tool. Programs share nothing."""
        return nullcontext()

    def save(self, family: Family) -> str:
        """See Tool."""
        return process.run_checked([self._program(family, "save")], doing=f"listing IP{family.value} rules")

    def restore(self, family: Family, text: str) -> None:
        """See Tool."""
        argv = [self._program(family, "restore"), "--noflush"]
        environment = None
        if self.variant == "legacy":
            # libiptc sets the built-in chains' own counters to 0 with every commit, even of an `iptables -N`.
            argv += ["-w", str(LOCK_WAIT_S), "--counters"]
            text = iptables_save.counted(text, self.save(family))
            is_in_vain = xtables_lock.is_held_elsewhere() or xtables_lock.cannot_be()
            environment = xtables_lock.ENVIRONMENT if is_in_vain else None
        else:
            text = iptables_save.marked(text, builtin_chains.existing(family))
        process.run_checked(
            argv,
            stdin=text,
            doing=f"loading IP{family.value} rules",
            timeout_s=LOCK_WAIT_S + process.TIMEOUT_S,
            environment=environment,
        )

    def tidy(self, family: Family) -> bool:
        """See Tool. Legacy's built-in chains come and go with their table, which only the kernel takes away."""
        return self.variant == "nft" and builtin_chains.remove_unused(family)

    def _program(self, family: Family, verb: str) -> str:
        return f"{'iptables' if family is Family.V4 else 'ip6tables'}-{self.variant}-{verb}"


@dataclass(frozen=True, slots=True)
class _Held:
    """What one family holds of ours."""

    tables: Tables
    leftovers: tuple[str, ...]  # tables with nothing of ours but markers


class IptablesBackend:
    """Works on the network namespace of the calling thread. See backends/base.py for the verbs."""

    def __init__(self, variant: Variant, tool: Tool | None = None, name: str | None = None) -> None:
        self.name = name or f"iptables-{variant}"
        self.strays: tuple[str, ...] = ()
        self._variant = variant
        self._tool = tool or Programs(variant)

    def apply(self, plan: Plan) -> bool:
        """Make the kernel hold `plan`; whether anything had to change.

        Raises BackendError; when a family fails both are put back to what they were, and the text says so.
        """
        with self._tool.opened():
            return self._apply(plan)

    def _apply(self, plan: Plan) -> bool:
        before = self._held()
        if not compare(self.expected(plan), _observed(before)):
            return False
        wanted = {family: iptables.rules(plan, family) for family in Family}
        uncoverable = [family.value for family in Family if wanted[family] and family not in before]
        if uncoverable:
            raise Unsupported(f"rules for IP{uncoverable[0]} are wanted, but this kernel has no IP{uncoverable[0]}")
        begun: list[Family] = []
        try:
            stale = self._with_stale_timeouts(before)
            cttimeout.ensure(users_of_timeouts(wanted))
            begun += before
            present = self._note_announced(wanted, before) if plan.waiting and plan.announced else before
            for family, held in present.items():
                self._restore(family, wanted[family], held.tables, anew=("raw",) if family in stale else ())
            self._finish(wanted)
            self._read_back(plan)
        except Exception as error:
            self._roll_back(begun, before, error)
            raise
        self.strays = tuple(_strays(before))
        return True

    def _note_announced(self, wanted: Mapping[Family, Tables], before: Mapping[Family, _Held]) -> Mapping[Family, _Held]:
        """Note that the proxy has announced itself, before any rule that asks could let something go; what is held then.

        The list of those who did exists while rules name it: raw's, which capture nothing, come first.
        """
        noting = {}
        for family, held in before.items():
            tables = {**held.tables, **{name: rules for name, rules in wanted[family].items() if name == "raw"}}
            self._restore(family, tables, held.tables)
            noting[family] = _Held(tables, held.leftovers)
        announced.note_in_list()
        return noting

    def _with_stale_timeouts(self, held: Mapping[Family, _Held]) -> frozenset[Family]:
        """Families whose rules name a conntrack timeout policy that is gone: one made anew is theirs when they are, too."""
        there = cttimeout.existing()
        named = users_of_timeouts({family: found.tables for family, found in held.items()})
        return frozenset(family for policy, family in named if (policy, family) not in there)

    def _restore(self, family: Family, wanted: Tables, present: Tables, anew: Collection[str] = ()) -> None:
        text = switch(wanted, present, family, anew)
        if text:
            self._tool.restore(family, text)

    def _finish(self, tables: Mapping[Family, Tables]) -> None:
        """Once the rules stand: take away what only the old ones needed."""
        self._remove_timeouts(needed=users_of_timeouts(tables))
        for family in tables:
            self._tool.tidy(family)

    def _read_back(self, plan: Plan) -> None:
        differences = compare(self.expected(plan), self.observe())
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise BackendError(f"{self.name} reported success, but the kernel holds something else: {differences[0]}{more}")

    def _roll_back(self, begun: Iterable[Family], before: Mapping[Family, _Held], cause: Exception) -> None:
        """Put the families that were `begun` back. Raises BackendError, from `cause`, if it concerned any rule."""
        try:
            touched = [family for family in begun if self._put_back(family, before[family].tables)]
            self._finish({family: held.tables for family, held in before.items()})
        except InterceptorError as second:
            raise BackendError(
                f"{cause}; putting the old rules back failed, too: {second}. What is there now is neither the old nor the new "
                "set: run the same command again, or clean"
            ) from cause
        if touched:
            names = " and ".join(f"IP{family.value}" for family in touched)
            kind = Unsupported if isinstance(cause, Unsupported) else BackendError
            raise kind(f"{cause}; {names} rules were put back to what they were") from cause

    def _put_back(self, family: Family, wanted: Tables) -> bool:
        now = iptables_save.parse(self._tool.save(family))
        # Strays that went are not put back: they do nothing without the chains that they led into.
        wanted = {name: replace(rules, strays=now.get(name, TableRules()).strays) for name, rules in wanted.items()}
        if all(same(wanted.get(table), now.get(table)) for table in iptables.TABLES):
            return False
        if wanted:
            self._tool.restore(family, switch(wanted, now, family))
        else:
            self._tool.restore(family, iptables.restore({}, now))
        return True

    def remove(self) -> bool:
        """Take away all our chains and jumps; whether there were any."""
        with self._tool.opened():
            return self._remove()

    def _remove(self) -> bool:
        found = False
        before = self._held()
        begun: list[Family] = []
        try:
            for family, held in before.items():
                begun.append(family)
                self._restore(family, {}, held.tables)
                found |= bool(held.tables)
        except Exception as error:
            self._roll_back(begun, before, error)
            raise
        self.strays = tuple(_strays(before))
        for family in before:
            found |= self._tool.tidy(family)
        return self._remove_timeouts(needed=()) or found

    def _remove_timeouts(self, *, needed: Collection[cttimeout.Policy]) -> bool:
        """Delete the conntrack timeout policies that no rule needs, of ours here or in the other variant."""
        from interceptor.backends import timeouts_in_use  # knows this module's tools

        return timeouts_in_use.remove_unused("legacy" if self._variant == "nft" else "nft", needed=needed)

    def holds(self, _plan: Plan) -> bool:
        """Only comparing what observe() gives tells."""
        return False

    def observe(self) -> Observed:
        """What of ours the kernel holds, both families."""
        return _observed(self._held())

    def expected(self, plan: Plan) -> Observed:
        """What observe() gives when the kernel holds exactly `plan`."""
        wanted = {family: _Held(iptables.rules(plan, family), ()) for family in Family}
        return Observed({**_rules(wanted), **_timeouts(users_of_timeouts({f: held.tables for f, held in wanted.items()}))})

    def _held(self) -> dict[Family, _Held]:
        return {
            family: _Held(iptables_save.parse(text), tuple(iptables_save.leftovers(text)))
            for family, text in saved(self._tool).items()
        }


def saved(tool: Tool) -> dict[Family, str]:
    """What `tool` saves of each family that this kernel has."""
    with tool.opened():
        return {family: tool.save(family) for family in Family if family is Family.V4 or os.path.exists(HAS_V6)}


def _observed(held: Mapping[Family, _Held]) -> Observed:
    users = users_of_timeouts({family: found.tables for family, found in held.items()})
    right = cttimeout.present() if users else ()
    return Observed({**_rules(held), **_timeouts(policy for policy in users if policy in right)})


def _strays(held: Mapping[Family, _Held]) -> Iterator[str]:
    for family, found in held.items():
        for name, table in found.tables.items():
            for chain, rules in table.strays.items():
                yield from (f"{family.value} {name}/{chain}: {rule}" for rule in rules)


def _rules(held: Mapping[Family, _Held]) -> dict[str, tuple[str, ...]]:
    chains: dict[str, tuple[str, ...]] = {}
    for family, found in held.items():
        chains |= {f"{family.value} {where}": rules for where, rules in iptables_save.observed(found.tables)}
        chains |= {f"{family.value} {table}/{iptables_save.NEW_TABLE}": () for table in found.leftovers}
    return chains


def _timeouts(policies: Iterable[cttimeout.Policy]) -> dict[str, tuple[str, ...]]:
    return {
        f"{family.value} conntrack timeout {timeout_name(policy, family)}": tuple(
            f"{state} {seconds}" for state, seconds in TIMEOUTS[policy].items()
        )
        for policy, family in policies
    }


def users_of_timeouts(tables: Mapping[Family, Tables]) -> list[cttimeout.Policy]:
    """The conntrack timeout policies that rules in `tables` name."""
    return [
        (policy, family)
        for policy, family in cttimeout.every()
        if family in tables and iptables_save.names_timeout(tables[family], timeout_name(policy, family))
    ]
