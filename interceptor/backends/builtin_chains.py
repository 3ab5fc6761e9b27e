"""The tables and built-in chains that iptables-nft makes and never takes away: which are there, and ours removed.

Ours are told by markers, render/iptables_save.py's NEW. Messages: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from interceptor.backends import netlink
from interceptor.errors import BackendError
from interceptor.render.iptables import PREFIX
from interceptor.render.iptables_save import NEW, NEW_TABLE
from interceptor.values import Family

NFNL_MSG_BATCH_BEGIN = 0x10  # linux/netfilter/nfnetlink.h
NFNL_MSG_BATCH_END = 0x11
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_GETTABLE = 1
NFT_MSG_DELTABLE = 2
NFT_MSG_GETCHAIN = 4
NFT_MSG_DELCHAIN = 5
NFTA_TABLE_NAME = 1
NFTA_CHAIN_TABLE = 1
NFTA_CHAIN_NAME = 3
NFTA_CHAIN_POLICY = 5
NFTA_CHAIN_USE = 6
ADDRESS_FAMILIES = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_ACCEPT = struct.pack("!I", 1)  # NF_ACCEPT
_NONE = struct.pack("!I", 0)
_GENERIC = struct.Struct("!BBH")  # struct nfgenmsg; res_id is in network order


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
        markers = {name for name in names if name.startswith(NEW)}
        is_ours = any(name.startswith(PREFIX) for name in names - markers)
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
    header = _GENERIC.pack(ADDRESS_FAMILIES[family], 0, 0)
    messages = []
    for chain in chains:
        if chain is None:
            kind, about = NFT_MSG_DELTABLE, netlink.attr(NFTA_TABLE_NAME, _terminated(table))
        else:
            about = netlink.attr(NFTA_CHAIN_TABLE, _terminated(table)) + netlink.attr(NFTA_CHAIN_NAME, _terminated(chain))
            kind = NFT_MSG_DELCHAIN
        # NLM_F_NONREC: refuse with EBUSY rather than take along a rule that somebody added a moment ago.
        messages.append(netlink.Message(NFNL_SUBSYS_NFTABLES << 8 | kind, header + about, netlink.NLM_F_NONREC))
    batch = _GENERIC.pack(socket.AF_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
    begin, end = netlink.Message(NFNL_MSG_BATCH_BEGIN, batch), netlink.Message(NFNL_MSG_BATCH_END, batch)
    try:
        netlink.transaction(netlink.NETLINK_NETFILTER, begin, messages, end)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _chains(family: Family) -> dict[str, list[_Chain]]:
    header = _GENERIC.pack(ADDRESS_FAMILIES[family], 0, 0)
    found: dict[str, list[_Chain]] = {}
    try:
        for kind in (NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN):
            for answer in netlink.dump(netlink.NETLINK_NETFILTER, NFNL_SUBSYS_NFTABLES << 8 | kind, header):
                attributes = netlink.parse_attrs(answer[_GENERIC.size :])
                # NFTA_TABLE_NAME and NFTA_CHAIN_TABLE are the same number.
                chains = found.setdefault(_text(attributes[NFTA_TABLE_NAME]), [])
                if kind == NFT_MSG_GETCHAIN:
                    refuses = attributes.get(NFTA_CHAIN_POLICY, _ACCEPT) != _ACCEPT
                    has_users = attributes.get(NFTA_CHAIN_USE, _NONE) != _NONE
                    chains.append(_Chain(_text(attributes[NFTA_CHAIN_NAME]), refuses or has_users))
    except OSError as error:
        if error.errno == errno.EINVAL:  # a kernel without nf_tables
            return {}
        raise BackendError(f"listing nftables chains: {error.strerror or error}") from error
    return found


def _terminated(text: str) -> bytes:
    return text.encode() + b"\0"


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
