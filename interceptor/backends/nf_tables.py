"""Messages of nf_tables over netlink: list objects, change them in one transaction. Knows no table of ours or of anybody's.

Numbers from linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from interceptor import nlattr
from interceptor.backends import netlink
from interceptor.values import Family

NFNL_MSG_BATCH_BEGIN = 0x10
NFNL_MSG_BATCH_END = 0x11
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_NEWTABLE, NFT_MSG_GETTABLE, NFT_MSG_DELTABLE = 0, 1, 2
NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN, NFT_MSG_DELCHAIN = 3, 4, 5
NFT_MSG_NEWRULE, NFT_MSG_GETRULE, NFT_MSG_DELRULE = 6, 7, 8
NFT_MSG_NEWSET, NFT_MSG_GETSET = 9, 10
NFT_MSG_NEWSETELEM, NFT_MSG_GETSETELEM = 12, 13
NFT_MSG_GETGEN = 16
NFT_MSG_NEWOBJ, NFT_MSG_GETOBJ = 18, 19
NFPROTO_INET = 1
# The table's name has the same number in all of them, the object's own in two.
NFTA_TABLE_NAME = NFTA_CHAIN_TABLE = NFTA_RULE_TABLE = NFTA_SET_TABLE = NFTA_OBJ_TABLE = NFTA_SET_ELEM_LIST_TABLE = 1
NFTA_SET_NAME = NFTA_OBJ_NAME = NFTA_SET_ELEM_LIST_SET = 2
NFTA_TABLE_FLAGS = 2
NFTA_CHAIN_HANDLE = 2
NFTA_CHAIN_NAME = 3
NFTA_CHAIN_POLICY = 5
NFTA_CHAIN_USE = 6
NFTA_CHAIN_COUNTERS = 8
NFTA_CHAIN_FLAGS = 10
NFTA_GEN_ID = 1
NFTA_OBJ_USE = 5
NFTA_OBJ_HANDLE = 6
NFTA_RULE_CHAIN = 2
NFTA_SET_ID = 10
NFTA_SET_HANDLE = 16
NFTA_SET_TYPE, NFTA_SET_COUNT = 19, 20  # Linux 6.16: how it is kept, and how many are in it
NFTA_SET_ELEM_LIST_ELEMENTS = 3
NFTA_RULE_HANDLE = 3
NFTA_RULE_EXPRESSIONS = 4
NFTA_RULE_USERDATA = 7
ADDRESS_FAMILIES = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_GENERIC = struct.Struct("!BBH")  # struct nfgenmsg; res_id is in network order


@dataclass(frozen=True, slots=True)
class Change:
    """One step of a transaction: an NFT_MSG_, the objects' family (AF_ or NFPROTO_), and which object."""

    kind: int
    family: int
    about: bytes
    flags: int = 0


def listed(kind: int, family: int, about: bytes = b"") -> list[bytes]:
    """The attributes of each object that an NFT_MSG_GET names. Raises OSError."""
    answers = netlink.dump(netlink.NETLINK_NETFILTER, NFNL_SUBSYS_NFTABLES << 8 | kind, _GENERIC.pack(family, 0, 0) + about)
    return [answer[_GENERIC.size :] for answer in answers]


def change(steps: Sequence[Change]) -> None:
    """All of `steps` or none. Raises OSError with the first refusal's errno."""
    commit(transaction(steps))


def transaction(steps: Sequence[Change]) -> netlink.Batch:
    """`steps` as a transaction, which may be made any number of times."""
    about = _GENERIC.pack(socket.AF_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
    messages = [
        netlink.Message(NFNL_SUBSYS_NFTABLES << 8 | step.kind, _GENERIC.pack(step.family, 0, 0) + step.about, step.flags)
        for step in steps
    ]
    return netlink.batch(netlink.Message(NFNL_MSG_BATCH_BEGIN, about), messages, netlink.Message(NFNL_MSG_BATCH_END, about))


def commit(prepared: netlink.Batch) -> None:
    """Make that transaction: all of it or nothing. Raises OSError with the first refusal's errno."""
    netlink.transaction(netlink.NETLINK_NETFILTER, prepared)


def generation() -> int:
    """A number that every change of this namespace's rules raises, whoever makes it (Linux 3.14). Raises OSError."""
    asked = netlink.Message(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, _GENERIC.pack(socket.AF_UNSPEC, 0, 0))
    (answer,) = netlink.request(netlink.NETLINK_NETFILTER, [asked])
    return int.from_bytes(nlattr.parse_attrs(answer[_GENERIC.size :])[NFTA_GEN_ID], "big")


def name(kind: int, text: str) -> bytes:
    """A name as an attribute."""
    return nlattr.attr(kind, text.encode() + b"\0")


def text(value: bytes) -> str:
    """A name's attribute as text."""
    return value.rstrip(b"\0").decode(errors="replace")
