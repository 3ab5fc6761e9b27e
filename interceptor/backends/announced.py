"""Whether the proxy has announced itself: the state behind `--before-proxy bypass`, which rules note and ask for.

In the kernel, like everything of ours: in our nft table, or in a list of xt_recent, which iptables' variants share. It goes
with the rules that ask for it.
"""

from __future__ import annotations

from contextlib import suppress

from interceptor.backends import nft_table
from interceptor.errors import BackendError
from interceptor.render.iptables import ANNOUNCED

# Writing "+ADDRESS" adds one (net/netfilter/xt_recent.c); rules look for everybody's, of their family.
LIST = f"/proc/thread-self/net/xt_recent/{ANNOUNCED}"
EVERYBODY = ("+0.0.0.0", "+::")


def noted() -> bool | None:
    """What rules here have noted; None when no rule of ours asks."""
    found = [state for state in (nft_table.announced(), _in_list()) if state is not None]
    return any(found) if found else None


def note_in_list() -> None:
    """What iptables rules do when the proxy announces itself, in both families. Some rule must ask. Raises BackendError."""
    try:
        for address in EVERYBODY:
            with open(LIST, "w", encoding="ascii") as entries:
                entries.write(address)
    except OSError as error:
        raise BackendError(f"noting in {LIST} that the proxy has announced itself: {error.strerror}") from error


def _in_list() -> bool | None:
    with suppress(OSError), open(LIST, encoding="ascii") as entries:
        return bool(entries.read())
    return None
