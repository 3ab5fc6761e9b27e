"""The tables and built-in chains that iptables-nft makes and never takes away: which are there, and ours removed.

Ours are told by markers, render/iptables_save.py's NEW.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from interceptor import nlattr
from interceptor.backends import netlink, nf_tables
from interceptor.backends.nf_tables import Change, name, text
from interceptor.errors import BackendError
from interceptor.render.iptables_save import NEW, NEW_TABLE
from interceptor.render.names import IPTABLES_PREFIX
from interceptor.values import Family

_ACCEPT = struct.pack("!I", 1)  # NF_ACCEPT
_NONE = struct.pack("!I", 0)


@dataclass(frozen=True, slots=True)
class _Chain:
    name: str
    used: bool  # it has rules, or is jumped to, or somebody set its policy to drop


def existing(family: Family) -> dict[str, list[str]]:
    """Table -> its chains, of nftables' ip or ip6 family, where iptables-nft's tables are. Raises BackendError."""
    return {table: [chain.name for chain in chains] for table, chains in _chains(family).items()}


def remove_unused(family: Family) -> bool:
    """Take away marked tables and chains that are empty; whether there were any.

    Once nothing of ours is left in a table its markers go in any case: what is in use then is somebody else's.
    Raises BackendError.
    """
    found = False
    for table, chains in _chains(family).items():
        names = {chain.name for chain in chains}
        markers = {chain for chain in names if chain.startswith(NEW)}
        is_ours = any(chain.startswith(IPTABLES_PREFIX) for chain in names - markers)
        used = {chain.name for chain in chains if chain.used}
        for marker in sorted(markers - {NEW_TABLE}):
            chain = marker.removeprefix(NEW)
            gone = chain in names - used and _delete(family, table, marker, chain)
            if not gone and not is_ours:
                gone = _delete(family, table, marker)
            found |= gone
        if NEW_TABLE in markers and not is_ours:
            found |= _delete(family, table, NEW_TABLE, None) or _delete(family, table, NEW_TABLE)
    return found


def _delete(family: Family, table: str, *chains: str | None) -> bool:
    """Delete these chains (None: the table) in one transaction; False when one of them is in use. Raises BackendError."""
    refusal = _try_delete(family, table, chains)
    if refusal not in (0, errno.EBUSY, errno.ENOENT):
        raise BackendError(f"deleting empty chains of {family.value} table {table}: {errno.errorcode.get(refusal, refusal)}")
    return refusal == 0


def _try_delete(family: Family, table: str, chains: Sequence[str | None]) -> int:
    number = nf_tables.ADDRESS_FAMILIES[family]
    steps = []
    for chain in chains:
        about, kind = name(nf_tables.NFTA_TABLE_NAME, table), nf_tables.NFT_MSG_DELTABLE
        if chain is not None:
            about, kind = about + name(nf_tables.NFTA_CHAIN_NAME, chain), nf_tables.NFT_MSG_DELCHAIN
        # NLM_F_NONREC: refuse with EBUSY rather than take along a rule that somebody added a moment ago.
        steps.append(Change(kind, number, about, netlink.NLM_F_NONREC))
    try:
        nf_tables.change(steps)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _chains(family: Family) -> dict[str, list[_Chain]]:
    number = nf_tables.ADDRESS_FAMILIES[family]
    found: dict[str, list[_Chain]] = {}
    try:
        for kind in (nf_tables.NFT_MSG_GETTABLE, nf_tables.NFT_MSG_GETCHAIN):
            for payload in nf_tables.listed(kind, number):
                attributes = nlattr.parse_attrs(payload)
                chains = found.setdefault(text(attributes[nf_tables.NFTA_TABLE_NAME]), [])
                if kind == nf_tables.NFT_MSG_GETCHAIN:
                    refuses = attributes.get(nf_tables.NFTA_CHAIN_POLICY, _ACCEPT) != _ACCEPT
                    has_users = attributes.get(nf_tables.NFTA_CHAIN_USE, _NONE) != _NONE
                    chains.append(_Chain(text(attributes[nf_tables.NFTA_CHAIN_NAME]), refuses or has_users))
    except OSError as error:
        if error.errno == errno.EINVAL:  # a kernel without nf_tables
            return {}
        raise BackendError(f"listing nftables chains: {error.strerror or error}") from error
    return found
