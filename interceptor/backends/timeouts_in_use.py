"""Which conntrack timeout policies rules of ours name in one of iptables' variants, for who takes the other's rules away.

The policies are the namespace's, the same for both. Not every kernel refuses to delete one that rules name.
"""

from __future__ import annotations

import os

from interceptor.backends import cttimeout, detect
from interceptor.backends.iptables import HAS_V6, Programs, Tool, Variant, users_of_timeouts
from interceptor.render import iptables_save
from interceptor.values import Family


def named_in(variant: Variant) -> frozenset[cttimeout.Policy]:
    """The policies that rules of ours name there: all, where there may be rules and nothing here reads them.

    Starts a program only where there may be rules. Raises BackendError.
    """
    if not detect.may_hold("iptables-nft" if variant == "nft" else "iptables-legacy"):
        return frozenset()
    tool = _tool(variant)
    if tool is None:
        return frozenset(cttimeout.every())
    families = [family for family in Family if family is Family.V4 or os.path.exists(HAS_V6)]
    with tool.opened():
        return frozenset(users_of_timeouts({family: iptables_save.parse(tool.save(family)) for family in families}))


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
