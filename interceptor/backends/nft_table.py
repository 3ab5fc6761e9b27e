"""Read over netlink which chains our nft table has and which comments its rules carry, or delete it. Starts no program.

A rule's comment is in its userdata, as libnftnl's TLVs (libnftnl/udata.h).
"""

from __future__ import annotations

import errno
import socket

from interceptor import nlattr
from interceptor.backends import netlink, nf_tables
from interceptor.backends.nf_tables import (
    NFPROTO_INET,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETTABLE,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE,
    NFTA_RULE_CHAIN,
    NFTA_RULE_TABLE,
    NFTA_RULE_USERDATA,
    NFTA_TABLE_NAME,
    Change,
    text,
)
from interceptor.errors import BackendError
from interceptor.render.names import IPTABLES_PREFIX, NFT_ANNOUNCED, NFT_TABLE

NFTNL_UDATA_RULE_COMMENT = 0
_TABLE = NFT_TABLE.encode() + b"\0"


def comments() -> dict[str, tuple[str, ...]] | None:
    """Chain -> its rules' comments in order ("" for a rule without one); None when our table isn't there."""
    if not exists():
        return None
    found: dict[str, list[str]] = {}
    for payload in _dump(NFT_MSG_GETCHAIN, nlattr.attr(NFTA_CHAIN_TABLE, _TABLE)):
        attributes = nlattr.parse_attrs(payload)
        if attributes.get(NFTA_CHAIN_TABLE) == _TABLE:
            found[text(attributes[NFTA_CHAIN_NAME])] = []
    for payload in _dump(NFT_MSG_GETRULE, nlattr.attr(NFTA_RULE_TABLE, _TABLE)):
        attributes = nlattr.parse_attrs(payload)
        # Kernels before 3.19 do not filter a dump by table.
        if attributes.get(NFTA_RULE_TABLE) == _TABLE:
            found.setdefault(text(attributes[NFTA_RULE_CHAIN]), []).append(_comment(attributes.get(NFTA_RULE_USERDATA, b"")))
    return {chain: tuple(rules) for chain, rules in found.items()}


def announced() -> bool | None:
    """Whether the proxy has announced itself, as our table notes; None when nothing there asks."""
    name = NFT_ANNOUNCED.encode() + b"\0"
    about = nlattr.attr(nf_tables.NFTA_SET_ELEM_LIST_TABLE, _TABLE) + nlattr.attr(nf_tables.NFTA_SET_ELEM_LIST_SET, name)
    try:
        listed = _dump(nf_tables.NFT_MSG_GETSETELEM, about)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # no such table or set; no nf_tables in this kernel
            return None
        raise BackendError(f"reading the nft set {NFT_ANNOUNCED}: {error.strerror or error}") from error
    return any(nlattr.parse_attrs(payload).get(nf_tables.NFTA_SET_ELEM_LIST_ELEMENTS) for payload in listed)


def delete() -> None:
    """Delete our table with all that is in it. Raises BackendError."""
    table = nf_tables.name(nf_tables.NFTA_TABLE_NAME, NFT_TABLE)
    try:
        nf_tables.change([Change(nf_tables.NFT_MSG_DELTABLE, NFPROTO_INET, table)])
    except OSError as error:
        raise BackendError(f"deleting the nft table: {error.strerror or error}") from error


def supported() -> bool:
    """Whether this kernel has nf_tables at all."""
    try:
        _dump(NFT_MSG_GETTABLE, b"")
    except OSError:
        return False
    return True


def has_iptables_chains() -> bool:
    """Whether iptables-nft holds chains of ours: their names start with IPTABLES_PREFIX, in tables of ip or ip6."""
    if not supported():
        return False
    return any(
        text(nlattr.parse_attrs(payload).get(NFTA_CHAIN_NAME, b"")).startswith(IPTABLES_PREFIX)
        for family in (socket.AF_INET, socket.AF_INET6)
        for payload in _dump(NFT_MSG_GETCHAIN, b"", family)
    )


def exists() -> bool:
    """Whether our table is there."""
    try:
        return any(nlattr.parse_attrs(payload).get(NFTA_TABLE_NAME) == _TABLE for payload in _dump(NFT_MSG_GETTABLE, b""))
    except OSError:
        return False


def _dump(message: int, attributes: bytes, family: int = NFPROTO_INET) -> list[bytes]:
    try:
        return nf_tables.listed(message, family, attributes)
    except PermissionError as error:
        from interceptor.backends import hints  # for those who fail

        raise BackendError(f"reading nftables: permission denied. {hints.NEEDS_NET_ADMIN}") from error
    except OSError as error:
        if error.errno in netlink.SHORT_OF:
            raise BackendError(f"reading nftables: {error.strerror}") from error
        raise


def _comment(userdata: bytes) -> str:
    position = 0
    while position + 2 <= len(userdata):
        kind, length = userdata[position], userdata[position + 1]
        if kind == NFTNL_UDATA_RULE_COMMENT:
            return text(userdata[position + 2 : position + 2 + length])
        position += 2 + length
    return ""
