"""The seam between plans and the kernel: three verbs, and how two rule lists are compared. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from interceptor.errors import BackendError
from interceptor.plan.model import Plan

DifferenceKind: TypeAlias = Literal["missing", "extra", "changed", "reordered"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which the kernel does not hold what the plan says. `where` is a chain, a route or an address."""

    kind: DifferenceKind
    where: str
    rule: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.rule}"


@dataclass(frozen=True, slots=True)
class Observed:
    """What the kernel holds of ours: chain (as "v4 nat/INTERCEPT_OUTPUT" or "nat_output") -> its rules' texts, in order.

    Chains without rules are there too, with (); a built-in chain stands with our jumps only.
    """

    chains: Mapping[str, tuple[str, ...]]


class NotConfirmed(BackendError):
    """New rules were loaded, all of them, in the place of old ones; that they stand could not be read back."""


class Backend(Protocol):
    """All verbs work on the network namespace of the calling thread; none leaves a half-applied state behind.

    Rules only: policy routes and the address on lo are the same for every backend, surroundings.py's business.
    """

    name: str
    # Rules of others that led into our chains and went with the last apply() or remove(): "v4 nat/OUTPUT: RULE".
    strays: tuple[str, ...]

    def apply(self, plan: Plan) -> bool:
        """Make the kernel hold `plan` and nothing else of ours in this backend's tables; whether that took a change.

        Raises BackendError: then nothing has changed, but for NotConfirmed. Reads back before it returns.

        Atomic as far as the kernel allows (one transaction on nft; a table and family each on iptables). Idempotent.
        """

    def remove(self) -> bool:
        """Take away all rules that are ours; whether there were any. Needs no plan. Raises BackendError."""

    def holds(self, plan: Plan) -> bool:
        """Whether the kernel holds exactly `plan`, where that shows without a program; False when in doubt. Changes nothing."""

    def observe(self) -> Observed:
        """What is ours in the kernel now. Changes nothing: never creates a table, never loads a module it needn't."""

    def expected(self, plan: Plan) -> Observed:
        """What observe() gives when the kernel holds exactly `plan`. No I/O."""


def compare(expected: Observed, found: Observed) -> tuple[Difference, ...]:
    """How `found` differs from `expected`; empty when it does not."""
    differences: list[Difference] = []
    for name, wanted in expected.chains.items():
        if name not in found.chains:
            differences.append(Difference("missing", name, "the whole chain"))
            differences += [Difference("missing", name, rule) for rule in wanted]
        else:
            differences += compare_chain(name, wanted, found.chains[name])
    for name, rules in found.chains.items():
        if name not in expected.chains:
            differences.append(Difference("extra", name, "the whole chain"))
            differences += [Difference("extra", name, rule) for rule in rules]
    return tuple(differences)


def compare_chain(where: str, wanted: Sequence[str], found: Sequence[str]) -> list[Difference]:
    """How one chain's rules differ: a rule in another place is reordered, not missing and extra."""
    if tuple(wanted) == tuple(found):
        return []
    if sorted(wanted) == sorted(found):
        moved = [rule for rule, other in zip(wanted, found, strict=True) if rule != other]
        return [Difference("reordered", where, rule) for rule in moved]
    import difflib  # 1 ms, and only for rules that differ

    differences: list[Difference] = []
    matcher = difflib.SequenceMatcher(a=list(wanted), b=list(found), autojunk=False)
    for tag, first, last, start, stop in matcher.get_opcodes():
        if tag == "equal":
            continue
        pairs = min(last - first, stop - start)
        differences += [
            Difference("changed", where, f"{found[start + step]} (should be: {wanted[first + step]})") for step in range(pairs)
        ]
        differences += [Difference("missing", where, rule) for rule in wanted[first + pairs : last]]
        differences += [Difference("extra", where, rule) for rule in found[start + pairs : stop]]
    return differences
