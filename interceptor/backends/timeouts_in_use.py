"""Delete conntrack timeout policies that no rule of ours names any more.

They are the namespace's, the same for both of iptables' variants: who takes one's rules away asks the other. Most kernels
refuse to delete one that rules name; Linux 6.12.117 deletes it, and the rules do nothing from then on.
"""

from __future__ import annotations

from collections.abc import Collection

from interceptor.backends import cttimeout, detect
from interceptor.backends.iptables import Programs, Tool, Variant, saved, users_of_timeouts
from interceptor.render import iptables_save


def remove_unused(*variants: Variant, needed: Collection[cttimeout.Policy] = ()) -> bool:
    """Delete the policies of ours that are not `needed` and that no rule of ours names in `variants`; whether there were any.

    Starts a program only where there are such policies, and may be such rules. Raises BackendError.
    """
    unused = [policy for policy in cttimeout.existing() if policy not in needed]
    if not unused:
        return False
    named = {policy for variant in variants for policy in _named_in(variant)}
    return cttimeout.remove(policy for policy in unused if policy not in named)


def _named_in(variant: Variant) -> Collection[cttimeout.Policy]:
    """All, where there may be rules and nothing here reads them."""
    if not detect.may_hold("iptables-nft" if variant == "nft" else "iptables-legacy"):
        return ()
    tool = _tool(variant)
    if tool is None:
        return cttimeout.every()
    return users_of_timeouts({family: iptables_save.parse(text) for family, text in saved(tool).items()})


def _tool(variant: Variant) -> Tool | None:
    missing = detect.Missing()
    if variant == "nft":
        return Programs("nft") if "iptables-nft" not in missing else None
    if "iptables-legacy" not in missing:
        return Programs("legacy")
    if "libiptc" in missing:
        return None
    from interceptor.backends.libiptc import Libiptc  # where there are no programs

    return Libiptc()
