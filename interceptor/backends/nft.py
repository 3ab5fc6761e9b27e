"""The native backend: one `nft -f` for both families, one transaction. What the rules say is render/nft.py's business.

At most one program is started: that our table is there, and with which rules in which order, is read over netlink
(nft_table.py). Only when that looks right is the full text listed and compared.
"""

from __future__ import annotations

from interceptor.backends import nft_table, process
from interceptor.backends.base import Observed, compare
from interceptor.errors import BackendError
from interceptor.plan.model import Plan
from interceptor.render import nft

NAME = "nft"
APPLY = ("nft", "-f", "-")
# --stateless leaves counters out; without --numeric-priority the text would depend on nft's names for priorities.
LIST = ("nft", "--stateless", "--numeric-priority", "list", "table", "inet", nft.TABLE)


class NftBackend:
    """Works on the network namespace of the calling thread."""

    name = NAME
    strays: tuple[str, ...] = ()  # nothing outside our table can lead into it

    def apply(self, plan: Plan) -> bool:
        """Make the kernel hold `plan`; whether anything had to change. One transaction; see backends/base.py."""
        if self._holds(plan):
            return False
        process.run_checked(APPLY, stdin=nft.script(plan), doing="loading the nft table")
        self._read_back(plan)
        return True

    def _holds(self, plan: Plan) -> bool:
        if nft_table.comments() != nft.comments(plan):
            return False
        return not compare(self.expected(plan), self.observe())

    def _read_back(self, plan: Plan) -> None:
        # nft 1.0.6 exits 0 and creates no chains for some inputs: its word is not taken for it.
        found, wanted = nft_table.comments(), nft.comments(plan)
        if found != wanted:
            lost = [chain for chain in wanted if found is None or found.get(chain) != wanted[chain]]
            raise BackendError(f"nft reported success, but the kernel does not hold what was loaded: chains {', '.join(lost)}")

    def remove(self) -> bool:
        """Delete our table; whether there was one."""
        if nft_table.comments() is None:
            return False
        # Over netlink: it must be possible after nft itself is gone.
        nft_table.delete()
        return True

    def observe(self) -> Observed:
        """What stands in our table now; no chains at all when there is none."""
        if nft_table.comments() is None:
            return Observed({})
        return Observed(nft.parse(process.run_checked(LIST, doing="listing the nft table")))

    def expected(self, plan: Plan) -> Observed:
        """What observe() gives when the kernel holds exactly `plan`."""
        return Observed(nft.parse(nft.table(plan)))
