"""Lists of ports, ids and networks as nf_tables compares them: one value, one range, or an anonymous set. Pure.

As nft 1.0 writes them, userdata included, from which nft lists what it was given. Numbers from linux/netfilter/nf_tables.h,
libnftnl's udata.h and nft's own (src/proto.c, include/expression.h, include/datatype.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from interceptor.nlattr import attr
from interceptor.render import nft_expressions as nft
from interceptor.values import Family, IdRange, Network, PortRange, Proto

NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_KEY_LEN, NFTA_SET_DESC, NFTA_SET_USERDATA = 3, 4, 5, 9, 13
NFTA_SET_DESC_SIZE = 1
NFT_SET_ANONYMOUS, NFT_SET_CONSTANT, NFT_SET_INTERVAL, NFT_SET_EVAL = 0x1, 0x2, 0x4, 0x20
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_FLAGS, NFTA_SET_ELEM_USERDATA = 1, 3, 6
NFT_SET_ELEM_INTERVAL_END = 1
_IPV4_ADDR, _IPV6_ADDR, _INET_SERVICE, _MARK, _UID, _GID = 7, 8, 13, 19, 24, 25  # TYPE_ of nft's datatypes
_HOST_ORDER, _BIG_ENDIAN = 1, 2
# NFTNL_UDATA_SET_KEYBYTEORDER, _MERGE_ELEMENTS, _KEY_TYPEOF; within the last the expression's type, and what describes it.
_KEYBYTEORDER, _MERGE_ELEMENTS, _KEY_TYPEOF = 0, 2, 3
_TYPEOF_EXPR, _TYPEOF_DATA = 0, 1
_EXPR_PAYLOAD, _EXPR_META = 7, 9
# PROTO_DESC_ and the field's number in the header, by nft's proto.c.
_PORT_FIELD = {Proto.UDP: (6, 2), Proto.TCP: (8, 2)}
_ADDRESS_FIELD = {
    (Family.V4, "saddr"): (12, 11),
    (Family.V4, "daddr"): (12, 12),
    (Family.V6, "saddr"): (13, 8),
    (Family.V6, "daddr"): (13, 9),
}
ADDRESS_OFFSET = {
    (Family.V4, "saddr"): 12,
    (Family.V4, "daddr"): 16,
    (Family.V6, "saddr"): 8,
    (Family.V6, "daddr"): 24,
}
_ADDRESS_SIZE = {Family.V4: 4, Family.V6: 16}
_PORTS_AT = 2  # the destination's, in TCP's and UDP's header
# NFTNL_UDATA_SET_ELEM_FLAGS with SET_ELEM_F_INTERVAL_OPEN: this interval has no end.
_OPEN = bytes([1, 4, 1, 0, 0, 0])
# Of an attribute's 65,535 bytes an element takes 44 at most.
_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Set:
    """A set to be made before the rule that asks it. `elements`: of a message each, as its attribute holds them."""

    attributes: bytes
    elements: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a list's values are: how long, of which nft datatype, and how nft's userdata describes where they come from."""

    size: int
    datatype: int
    order: int
    typeof: bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """Expressions that ask for a list's values, and the set that they need, if any."""

    expressions: bytes
    needs: Set | None = None


def ports(proto: Proto, wanted: Sequence[PortRange], name: str) -> Asked:
    """The destination port is one of `wanted`; the protocol was asked for. `name`: of the set, if one is needed."""
    load = nft.payload(nft.NFT_PAYLOAD_TRANSPORT_HEADER, _PORTS_AT, 2)
    kind = _Kind(2, _INET_SERVICE, _BIG_ENDIAN, _of_payload(*_PORT_FIELD[proto]))
    return _one_of(load, kind, [(each.first, each.last) for each in wanted], name)


def owners(key: int, wanted: Sequence[IdRange], name: str) -> Asked:
    """The sender's user (NFT_META_SKUID) or group is one of `wanted`."""
    kind = _Kind(4, _UID if key == nft.NFT_META_SKUID else _GID, _HOST_ORDER, _of_meta(key))
    ranges = [(each.first, each.last) for each in wanted]
    if all(first == last for first, last in ranges):
        if len(ranges) == 1:
            return Asked(nft.meta(key) + nft.cmp(nft.host(ranges[0][0])))
        return Asked(nft.meta(key) + nft.lookup(name), _values(kind, [nft.host(first) for first, _ in ranges]))
    return _one_of(nft.meta(key) + nft.byteorder(), kind, ranges, name)


def networks(family: Family, end: str, wanted: Sequence[Network], name: str) -> Asked:
    """The source ("saddr") or destination ("daddr") is in one of `wanted`, which are of `family`, as the packet is."""
    ordered = sorted(wanted, key=lambda item: int(item.network_address))
    if len(ordered) == 1:
        return Asked(_in_network(family, end, ordered[0]))
    size = _ADDRESS_SIZE[family]
    datatype = _IPV4_ADDR if family is Family.V4 else _IPV6_ADDR
    kind = _Kind(size, datatype, _BIG_ENDIAN, _of_payload(*_ADDRESS_FIELD[family, end]))
    ranges = _joined([(int(item.network_address), int(item.broadcast_address)) for item in ordered])
    return _one_of(_address(family, end, size), kind, ranges, name)


def announced(begins: bool) -> Set:
    """The set that holds whether the proxy has announced itself: at most one mark."""
    kind = _Kind(4, _MARK, _HOST_ORDER, b"")
    attributes = _attributes(NFT_SET_EVAL, kind, 1, _user(_KEYBYTEORDER, nft.host(_HOST_ORDER)))
    return Set(attributes, (_element(bytes(4)),) if begins else ())


def _address(family: Family, end: str, size: int) -> bytes:
    return nft.payload(nft.NFT_PAYLOAD_NETWORK_HEADER, ADDRESS_OFFSET[family, end], size)


def _in_network(family: Family, end: str, network: Network) -> bytes:
    packed, size, length = network.network_address.packed, _ADDRESS_SIZE[family], network.prefixlen
    if length % 8 == 0 and length:
        return _address(family, end, length // 8) + nft.cmp(packed[: length // 8])
    return _address(family, end, size) + nft.bitwise(network.netmask.packed, bytes(size)) + nft.cmp(packed)


def _one_of(load: bytes, kind: _Kind, ranges: Sequence[tuple[int, int]], name: str) -> Asked:
    """`ranges` are sorted, and do not touch."""
    packed = [(first.to_bytes(kind.size, "big"), last.to_bytes(kind.size, "big")) for first, last in ranges]
    if len(packed) == 1:
        first, last = packed[0]
        if first == last:
            return Asked(load + nft.cmp(first))
        return Asked(load + nft.cmp(first, nft.NFT_CMP_GTE) + nft.cmp(last, nft.NFT_CMP_LTE))
    if all(first == last for first, last in packed):
        return Asked(load + nft.lookup(name), _values(kind, [first for first, _ in packed]))
    return Asked(load + nft.lookup(name), _intervals(kind, ranges))


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and first == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _values(kind: _Kind, keys: Sequence[bytes]) -> Set:
    userdata = _user(_KEYBYTEORDER, nft.host(kind.order)) + kind.typeof
    attributes = _attributes(NFT_SET_ANONYMOUS | NFT_SET_CONSTANT, kind, len(keys), userdata)
    return Set(attributes, _messages([_element(key) for key in keys]))


def _intervals(kind: _Kind, ranges: Sequence[tuple[int, int]]) -> Set:
    """An element where each interval begins, and one where it has ended; from 0 on either is said."""
    size, beyond = kind.size, 1 << 8 * kind.size
    elements = [_element(bytes(size), NFT_SET_ELEM_INTERVAL_END)] if ranges[0][0] else []
    for first, last in ranges:
        if last + 1 == beyond:
            elements.append(_element(first.to_bytes(size, "big"), userdata=_OPEN))
        else:
            elements.append(_element(first.to_bytes(size, "big")))
            elements.append(_element((last + 1).to_bytes(size, "big"), NFT_SET_ELEM_INTERVAL_END))
    order, merged = _user(_KEYBYTEORDER, nft.host(kind.order)), _user(_MERGE_ELEMENTS, nft.host(1))
    # nft counts the end of an interval that has none, too.
    count = len(elements) + (ranges[-1][1] + 1 == beyond)
    flags = NFT_SET_ANONYMOUS | NFT_SET_CONSTANT | NFT_SET_INTERVAL
    return Set(_attributes(flags, kind, count, order + merged + kind.typeof), _messages(elements))


def _messages(elements: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(b"".join(elements[at : at + _AT_ONCE]) for at in range(0, len(elements), _AT_ONCE))


def _element(key: bytes, flags: int = 0, userdata: bytes = b"") -> bytes:
    attributes = nft.value(NFTA_SET_ELEM_KEY, key)
    if flags:
        attributes += nft.number(NFTA_SET_ELEM_FLAGS, flags)
    if userdata:
        attributes += attr(NFTA_SET_ELEM_USERDATA, userdata)
    return attr(nft.NFTA_LIST_ELEM, attributes)


def _attributes(flags: int, kind: _Kind, size: int, userdata: bytes) -> bytes:
    return b"".join(
        (
            nft.number(NFTA_SET_FLAGS, flags),
            nft.number(NFTA_SET_KEY_TYPE, kind.datatype),
            nft.number(NFTA_SET_KEY_LEN, kind.size),
            attr(NFTA_SET_USERDATA, userdata),
            attr(NFTA_SET_DESC, nft.number(NFTA_SET_DESC_SIZE, size)),
        )
    )


def _user(kind: int, content: bytes) -> bytes:
    # struct nftnl_udata: a byte of type, one of length.
    return bytes([kind, len(content)]) + content


@lru_cache
def _of_payload(protocol: int, field: int) -> bytes:
    described = _user(0, nft.host(protocol)) + _user(1, nft.host(field))  # NFTNL_UDATA_SET_KEY_PAYLOAD_DESC, _TYPE
    return _user(_KEY_TYPEOF, _user(_TYPEOF_EXPR, nft.host(_EXPR_PAYLOAD)) + _user(_TYPEOF_DATA, described))


@lru_cache
def _of_meta(key: int) -> bytes:
    described = _user(0, nft.host(key))  # NFTNL_UDATA_SET_TYPEOF_META_KEY
    return _user(_KEY_TYPEOF, _user(_TYPEOF_EXPR, nft.host(_EXPR_META)) + _user(_TYPEOF_DATA, described))
