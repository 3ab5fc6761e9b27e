"""Read over netlink which chains our nft table has and which comments its rules carry. Starts no program, changes nothing.

nf_tables is in linux/netfilter/nf_tables.h. A rule's comment is in its userdata, as libnftnl's TLVs (libnftnl/udata.h).
"""

from __future__ import annotations

import socket
import struct

from interceptor.backends import netlink
from interceptor.errors import BackendError
from interceptor.render import iptables, nft

NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_GETTABLE = 1
NFT_MSG_GETCHAIN = 4
NFT_MSG_GETRULE = 7
NFPROTO_INET = 1
NFTA_TABLE_NAME = 1
NFTA_CHAIN_TABLE = 1
NFTA_CHAIN_NAME = 3
NFTA_RULE_TABLE = 1
NFTA_RULE_CHAIN = 2
NFTA_RULE_USERDATA = 7
NFTNL_UDATA_RULE_COMMENT = 0
_TABLE = nft.TABLE.encode() + b"\0"


def comments() -> dict[str, tuple[str, ...]] | None:
    """Chain -> its rules' comments in order ("" for a rule without one); None when our table isn't there."""
    if not _table_exists():
        return None
    found: dict[str, list[str]] = {}
    for payload in _dump(NFT_MSG_GETCHAIN, netlink.attr(NFTA_CHAIN_TABLE, _TABLE)):
        attributes = netlink.parse_attrs(payload)
        if attributes.get(NFTA_CHAIN_TABLE) == _TABLE:
            found[_text(attributes[NFTA_CHAIN_NAME])] = []
    for payload in _dump(NFT_MSG_GETRULE, netlink.attr(NFTA_RULE_TABLE, _TABLE)):
        attributes = netlink.parse_attrs(payload)
        # Kernels before 3.19 do not filter a dump by table.
        if attributes.get(NFTA_RULE_TABLE) == _TABLE:
            found.setdefault(_text(attributes[NFTA_RULE_CHAIN]), []).append(_comment(attributes.get(NFTA_RULE_USERDATA, b"")))
    return {chain: tuple(rules) for chain, rules in found.items()}


def supported() -> bool:
    """Whether this kernel has nf_tables at all."""
    try:
        _dump(NFT_MSG_GETTABLE, b"")
    except OSError:
        return False
    return True


def has_iptables_chains() -> bool:
    """Whether iptables-nft holds chains of ours: their names start with render.iptables.PREFIX, in tables of ip or ip6."""
    if not supported():
        return False
    return any(
        _text(netlink.parse_attrs(payload).get(NFTA_CHAIN_NAME, b"")).startswith(iptables.PREFIX)
        for family in (socket.AF_INET, socket.AF_INET6)
        for payload in _dump(NFT_MSG_GETCHAIN, b"", family)
    )


def _table_exists() -> bool:
    try:
        return any(netlink.parse_attrs(payload).get(NFTA_TABLE_NAME) == _TABLE for payload in _dump(NFT_MSG_GETTABLE, b""))
    except OSError:
        return False


def _dump(message: int, attributes: bytes, family: int = NFPROTO_INET) -> list[bytes]:
    header = struct.pack("=BBH", family, 0, 0)  # struct nfgenmsg
    kind = NFNL_SUBSYS_NFTABLES << 8 | message
    try:
        answers = netlink.dump(netlink.NETLINK_NETFILTER, kind, header + attributes)
    except PermissionError as error:
        raise BackendError("reading nftables needs CAP_NET_ADMIN in this network namespace") from error
    return [answer[len(header) :] for answer in answers]


def _comment(userdata: bytes) -> str:
    position = 0
    while position + 2 <= len(userdata):
        kind, length = userdata[position], userdata[position + 1]
        if kind == NFTNL_UDATA_RULE_COMMENT:
            return _text(userdata[position + 2 : position + 2 + length])
        position += 2 + length
    return ""


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
