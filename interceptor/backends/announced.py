"""Whether the proxy has announced itself: the state behind `--before-proxy bypass`, which rules note and ask for.

In the kernel, like everything of ours: in our nft table, or in a list of xt_recent, which iptables' variants share. It goes
with the rules that ask for it.
"""

from __future__ import annotations

from contextlib import suppress

from interceptor.backends import nft_table
from interceptor.errors import BackendError
from interceptor.render.names import IPTABLES_ANNOUNCED
from interceptor.values import Family

# Writing "+ADDRESS" adds one (net/netfilter/xt_recent.c); rules look for everybody's, of their family.
LIST = f"/proc/thread-self/net/xt_recent/{IPTABLES_ANNOUNCED}"
EVERYBODY = ("+0.0.0.0", "+::")


def noted() -> frozenset[Family] | None:
    """The families for which rules have noted it; None when no rule of ours asks. In nft one announcement is for both."""
    in_table, in_list = nft_table.announced(), _in_list()
    if in_table is None and in_list is None:
        return None
    return frozenset(Family if in_table else ()) | (in_list or frozenset())


def note_in_list() -> None:
    """What iptables rules do when the proxy announces itself, in both families. Some rule must ask. Raises BackendError."""
    try:
        for address in EVERYBODY:
            with open(LIST, "w", encoding="ascii") as entries:
                entries.write(address)
    except OSError as error:
        raise BackendError(f"noting in {LIST} that the proxy has announced itself: {error.strerror}") from error


def _in_list() -> frozenset[Family] | None:
    with suppress(OSError), open(LIST, encoding="ascii") as entries:
        addresses = [line.split()[0].removeprefix("src=") for line in entries]
        return frozenset(Family.V6 if ":" in address else Family.V4 for address in addresses)
    return None
