"""The native backend: our table for both families in one transaction. What the rules say is the renderers' business.

Usually no program is started: the table is loaded and compared over netlink, as attributes (nft_load.py). The nft program is
asked when the kernel refuses, for it says which rule and why; and to tell how what stands differs, as text.
docs/decisions/0016-nft-over-netlink.md.
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache

from interceptor.backends import cgroups, nft_load, nft_table, process
from interceptor.backends.base import NotConfirmed, Observed, compare
from interceptor.backends.nft_load import Loadable
from interceptor.errors import BackendError
from interceptor.plan.model import Plan
from interceptor.render import nft, nft_bytes

NAME = "nft"
APPLY = ("nft", "-f", "-")
# --stateless leaves counters out; without --numeric-priority the text would depend on nft's names for priorities.
LIST = ("nft", "--stateless", "--numeric-priority", "list", "table", "inet", nft.TABLE)
# Where nft looks for a cgroup v2 (src/datatype.c).
CGROUPS = "/sys/fs/cgroup"


class NftBackend:
    """Works on the network namespace of the calling thread."""

    name = NAME
    strays: tuple[str, ...] = ()  # nothing outside our table can lead into it

    def apply(self, plan: Plan) -> bool:
        """Make the kernel hold `plan`; whether anything had to change. One transaction; see backends/base.py."""
        stands = nft_table.exists()
        if stands and (self.holds(plan) or self._is_equal(plan)):
            return False
        try:
            nft_load.load(_loadable(plan), replacing=stands)
        except OSError:
            # The kernel's errno alone does not say what it lacks, nor which rule it refuses.
            process.run_checked(APPLY, stdin=nft.script(plan), doing="loading the nft table")
        try:
            if not self.holds(plan):
                self._read_back(plan)
        except Exception as error:
            if stands:
                raise NotConfirmed(f"{error}; the old rules are gone: run the same command again, or clean") from error
            nft_table.delete()
            raise
        return True

    def holds(self, plan: Plan) -> bool:
        """See backends/base.py. Over netlink: every attribute of every rule."""
        with suppress(OSError):
            return nft_load.holds(_loadable(plan))
        return False

    def _is_equal(self, plan: Plan) -> bool:
        # As text: loaded by another version of nft, or on a kernel that says more than those known so far.
        return nft_table.comments() == nft.comments(plan) and not compare(self.expected(plan), self.observe())

    def _read_back(self, plan: Plan) -> None:
        # nft 1.0.6 exits 0 and creates no chains for some inputs: its word is not taken for it.
        differences = compare(self.expected(plan), self.observe())
        if differences:
            lost = ", ".join(dict.fromkeys(difference.where for difference in differences))
            raise BackendError(f"the nft table was loaded, but the kernel does not hold it: chains {lost}")

    def remove(self) -> bool:
        """Delete our table; whether there was one."""
        if not nft_table.exists():
            return False
        # Over netlink: it must be possible after nft itself is gone.
        nft_table.delete()
        return True

    def observe(self) -> Observed:
        """What stands in our table now; no chains at all when there is none."""
        if not nft_table.exists():
            return Observed({})
        return Observed(nft.parse(process.run_checked(LIST, doing="listing the nft table")))

    def expected(self, plan: Plan) -> Observed:
        """What observe() gives when the kernel holds exactly `plan`."""
        return Observed(nft.parse(nft.table(plan)))


class _ById:
    """A plan as a key: hashing its rules would cost as much as rendering them."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __hash__(self) -> int:
        return id(self.plan)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.plan is other.plan


def _loadable(plan: Plan) -> Loadable:
    """Raises OSError where there is no cgroup v2 that a rule names."""
    paths = {rule.match.cgroup for chain in plan.chains for rule in chain.rules if rule.match.cgroup is not None}
    return _rendered(_ById(plan), tuple((path, cgroups.identity(f"{CGROUPS}/{path}")) for path in sorted(paths)))


# An agent loads the same plan in pod after pod.
@lru_cache(64)
def _rendered(key: _ById, numbers: tuple[tuple[str, int], ...]) -> Loadable:
    return Loadable(nft_bytes.table(key.plan, dict(numbers)))
