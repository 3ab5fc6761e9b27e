"""The expressions that nf_tables rules are made of, as netlink attributes. Pure; knows no plan.

Each carries every attribute that the kernel gives back for it, defaults too, in the kernel's order and without the flag of
nested ones, as it does: what stands can be compared byte for byte. It takes them in any order, with the flag or without.
Numbers from linux/netfilter/nf_tables.h unless said. Packets' values are in network order, the kernel's own in the machine's.
"""

from __future__ import annotations

import struct
import sys
from functools import lru_cache

from interceptor.nlattr import attr

NFTA_LIST_ELEM = 1
NFTA_EXPR_NAME = 1
NFTA_EXPR_DATA = 2
NFTA_DATA_VALUE = 1
NFTA_DATA_VERDICT = 2
NFTA_VERDICT_CODE = 1
NFTA_VERDICT_CHAIN = 2
NFT_REG_VERDICT = 0
NFT_REG_1 = 1
NFT_JUMP, NFT_GOTO, NFT_RETURN = -3, -4, -5
NF_DROP, NF_ACCEPT = 0, 1  # linux/netfilter.h
NFT_CMP_EQ, NFT_CMP_NEQ, NFT_CMP_LTE, NFT_CMP_GTE = 0, 1, 3, 5
NFT_META_MARK, NFT_META_IIFNAME, NFT_META_OIFNAME = 3, 6, 7
NFT_META_SKUID, NFT_META_SKGID, NFT_META_NFPROTO, NFT_META_L4PROTO = 10, 11, 15, 16
NFT_CT_STATE, NFT_CT_DIRECTION, NFT_CT_STATUS, NFT_CT_MARK, NFT_CT_ZONE = 0, 1, 2, 3, 17
NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER = 1, 2
NFT_BITWISE_BOOL = 0
NFT_BYTEORDER_HTON = 1
NFT_FIB_RESULT_ADDRTYPE = 3
NFTA_FIB_F_SADDR, NFTA_FIB_F_DADDR = 1, 2
NFT_SOCKET_CGROUPV2 = 3
NFT_LOOKUP_F_INV = 1
NFT_DYNSET_OP_ADD = 0
NFT_OBJECT_CT_TIMEOUT = 7
NF_NAT_RANGE_PROTO_SPECIFIED = 2  # linux/netfilter/nf_nat.h
LOG_WARNING = 4  # sys/syslog.h: the kernel's level for a rule that names none
IFNAMSIZ = 16  # linux/if.h
# An agent builds the same ones for each pod; those of as many different configurations as a node may have.
_KEPT = 2048
BYTE_ORDER = sys.byteorder
_NUMBER = struct.Struct("!I")
_SIGNED = struct.Struct("!i")

kept = lru_cache(_KEPT)


def number(kind: int, value: int) -> bytes:
    """A 32-bit number as nf_tables writes them, big-endian."""
    return attr(kind, _NUMBER.pack(value))


def signed(kind: int, value: int) -> bytes:
    """The same, below zero too."""
    return attr(kind, _SIGNED.pack(value))


def text(kind: int, value: str) -> bytes:
    """A name, NUL-ended."""
    return attr(kind, value.encode() + b"\0")


def value(kind: int, content: bytes) -> bytes:
    """What a register or a set's element holds."""
    return attr(kind, attr(NFTA_DATA_VALUE, content))


def host(content: int, size: int = 4) -> bytes:
    """A number of the kernel's own."""
    return content.to_bytes(size, BYTE_ORDER)


def port(content: int) -> bytes:
    """A port, as in a packet."""
    return content.to_bytes(2, "big")


def _expression(name: str, *attributes: bytes) -> bytes:
    return attr(NFTA_LIST_ELEM, text(NFTA_EXPR_NAME, name) + attr(NFTA_EXPR_DATA, b"".join(attributes)))


# Attributes: NFTA_META_DREG 1, NFTA_META_KEY 2, NFTA_META_SREG 3; NFTA_CT_DREG 1, _KEY 2, _DIRECTION 3, _SREG 4.
@kept
def meta(key: int) -> bytes:
    """Load a property of the packet."""
    return _expression("meta", number(2, key), number(1, NFT_REG_1))


@kept
def set_meta(key: int) -> bytes:
    """Change one."""
    return _expression("meta", number(2, key), number(3, NFT_REG_1))


@kept
def ct(key: int) -> bytes:
    """Load a property of the connection."""
    return _expression("ct", number(1, NFT_REG_1), number(2, key))


@kept
def set_ct(key: int) -> bytes:
    """Change one."""
    return _expression("ct", number(4, NFT_REG_1), number(2, key))


@kept
def set_original_zone() -> bytes:
    """Choose the conntrack zone of packets in the original direction (IP_CT_DIR_ORIGINAL 0)."""
    return _expression("ct", number(4, NFT_REG_1), number(2, NFT_CT_ZONE), attr(3, b"\0"))


# NFTA_CMP_SREG 1, _OP 2, _DATA 3.
@kept
def cmp(content: bytes, operator: int = NFT_CMP_EQ) -> bytes:
    """Go on if what was loaded compares so."""
    return _expression("cmp", number(1, NFT_REG_1), number(2, operator), value(3, content))


# NFTA_PAYLOAD_DREG 1, _BASE 2, _OFFSET 3, _LEN 4.
@kept
def payload(base: int, offset: int, length: int) -> bytes:
    """Load bytes of the packet."""
    return _expression("payload", number(1, NFT_REG_1), number(2, base), number(3, offset), number(4, length))


# NFTA_BITWISE_SREG 1, _DREG 2, _LEN 3, _MASK 4, _XOR 5, _OP 6.
@kept
def bitwise(mask: bytes, xor: bytes) -> bytes:
    """Change what was loaded: (it & mask) ^ xor."""
    registers = (number(1, NFT_REG_1), number(2, NFT_REG_1))
    return _expression("bitwise", *registers, number(3, len(mask)), number(6, NFT_BITWISE_BOOL), value(4, mask), value(5, xor))


# NFTA_BYTEORDER_SREG 1, _DREG 2, _OP 3, _LEN 4, _SIZE 5.
@kept
def byteorder() -> bytes:
    """Turn a number of the kernel's own into network order: only so ranges compare as bytes."""
    registers = (number(1, NFT_REG_1), number(2, NFT_REG_1), number(3, NFT_BYTEORDER_HTON))
    return _expression("byteorder", *registers, number(4, 4), number(5, 4))


# NFTA_FIB_DREG 1, _RESULT 2, _FLAGS 3.
@kept
def fib(flags: int) -> bytes:
    """Load what kind of address it is, by the routing table."""
    return _expression("fib", number(1, NFT_REG_1), number(2, NFT_FIB_RESULT_ADDRTYPE), number(3, flags))


# NFTA_SOCKET_KEY 1, _DREG 2, _LEVEL 3.
@kept
def cgroup(level: int) -> bytes:
    """Load the number of the socket's cgroup, or of the one above it at that level."""
    return _expression("socket", number(1, NFT_SOCKET_CGROUPV2), number(2, NFT_REG_1), number(3, level))


# NFTA_LOOKUP_SET 1, _SREG 2, _FLAGS 5.
@kept
def lookup(name: str, flags: int = 0) -> bytes:
    """Go on if what was loaded is in the set; with NFT_LOOKUP_F_INV, if it is not."""
    return _expression("lookup", text(1, name), number(2, NFT_REG_1), number(5, flags))


# NFTA_DYNSET_SET_NAME 1, _OP 3, _SREG_KEY 4.
@kept
def add_to(name: str) -> bytes:
    """Put what was loaded into the set."""
    return _expression("dynset", number(4, NFT_REG_1), number(3, NFT_DYNSET_OP_ADD), text(1, name))


# NFTA_COUNTER_BYTES 1, _PACKETS 2.
@kept
def counter() -> bytes:
    """Count packets and bytes, from 0."""
    return _expression("counter", attr(1, bytes(8)), attr(2, bytes(8)))


# NFTA_IMMEDIATE_DREG 1, _DATA 2.
@kept
def immediate(content: bytes) -> bytes:
    """Load this."""
    return _expression("immediate", number(1, NFT_REG_1), value(2, content))


@kept
def verdict(code: int, chain: str = "") -> bytes:
    """End the rule: NF_DROP, NF_ACCEPT, NFT_RETURN, or NFT_JUMP and NFT_GOTO with a chain."""
    target = text(NFTA_VERDICT_CHAIN, chain) if chain else b""
    decided = attr(NFTA_DATA_VERDICT, signed(NFTA_VERDICT_CODE, code) + target)
    return _expression("immediate", number(1, NFT_REG_VERDICT), attr(2, decided))


# NFTA_REDIR_REG_PROTO_MIN 1, _REG_PROTO_MAX 2, _FLAGS 3.
@kept
def redirect() -> bytes:
    """Send to the port that was loaded, of this host."""
    return _expression("redir", number(1, NFT_REG_1), number(2, NFT_REG_1), number(3, NF_NAT_RANGE_PROTO_SPECIFIED))


# NFTA_TPROXY_FAMILY 1, _REG_PORT 3.
@kept
def tproxy(family: int) -> bytes:
    """Give to the transparent socket at the port that was loaded; `family` an NFPROTO_, 0 for both."""
    return _expression("tproxy", number(1, family), number(3, NFT_REG_1))


# NFTA_OBJREF_IMM_TYPE 1, _IMM_NAME 2.
@kept
def timeouts(name: str) -> bytes:
    """Give the new connection the timeouts of the object with that name."""
    return _expression("objref", text(2, name), number(1, NFT_OBJECT_CT_TIMEOUT))


# NFTA_LOG_PREFIX 2, _LEVEL 5.
@kept
def log(prefix: str) -> bytes:
    """Write the packet to the kernel's log."""
    return _expression("log", text(2, prefix), number(5, LOG_WARNING))
