"""Our nft table over netlink: load it in one transaction, and see whether the kernel holds exactly it. Starts no program.

What the table says is render/nft_bytes.py's business. Numbers from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TypeAlias

from interceptor import nlattr
from interceptor.backends import netlink, nf_tables
from interceptor.backends.nf_tables import NFPROTO_INET, Change, name, text
from interceptor.render import nft
from interceptor.render.nft_bytes import RuleBytes, TableBytes
from interceptor.render.nft_expressions import NFTA_EXPR_DATA, NFTA_EXPR_NAME

_TABLE = name(nf_tables.NFTA_TABLE_NAME, nft.TABLE)
_TABLE_NAME = nft.TABLE.encode() + b"\0"
_NO_FLAGS = bytes(4)
_MADE = _TABLE + nlattr.attr(nf_tables.NFTA_TABLE_FLAGS, _NO_FLAGS)
_CREATED = netlink.NLM_F_CREATE
_APPENDED = netlink.NLM_F_CREATE | netlink.NLM_F_APPEND
# What the kernel adds of its own: handles, how often an object is used, what a counter has counted.
_OF_CHAIN = frozenset(
    {nf_tables.NFTA_CHAIN_HANDLE, nf_tables.NFTA_CHAIN_USE, nf_tables.NFTA_CHAIN_COUNTERS, nf_tables.NFTA_CHAIN_FLAGS}
)
_OF_OBJECT = frozenset({nf_tables.NFTA_OBJ_USE, nf_tables.NFTA_OBJ_HANDLE})
_OF_SET = frozenset({nf_tables.NFTA_SET_HANDLE, nf_tables.NFTA_SET_TYPE, nf_tables.NFTA_SET_COUNT})
# By expression: NFTA_COUNTER_BYTES, _PACKETS; NFTA_DYNSET_TIMEOUT, _FLAGS, zero in all that we write and not to be asked for.
_OF_EXPRESSION = {b"counter\0": frozenset({1, 2}), b"dynset\0": frozenset({6, 9})}
_LISTED = (nf_tables.NFT_MSG_GETCHAIN, nf_tables.NFT_MSG_GETRULE, nf_tables.NFT_MSG_GETOBJ, nf_tables.NFT_MSG_GETSET)
_NONE: frozenset[int] = frozenset()

Attributes: TypeAlias = dict[int, bytes]


class Loadable:
    """A table, ready to be loaded any number of times."""

    def __init__(self, table: TableBytes) -> None:
        self.table = table
        # What the set of announcements holds is a state, which comes and goes by itself.
        asked = [name(nf_tables.NFTA_SET_ELEM_LIST_SET, each) for each in table.sets if each != nft.ANNOUNCED]
        self.lists = [*((kind, b"") for kind in _LISTED), *((nf_tables.NFT_MSG_GETSETELEM, each) for each in asked)]
        # What the kernel said when it held the table; most pods' answers are the same, as long as no packet is counted.
        self.said: list[list[bytes]] = []

    @cached_property
    def creation(self) -> netlink.Batch:
        """The transaction where no table of ours stands: it fails where one does."""
        return self._after(Change(nf_tables.NFT_MSG_NEWTABLE, NFPROTO_INET, _MADE, _CREATED | netlink.NLM_F_EXCL))

    @property
    def replacement(self) -> netlink.Batch:
        """The transaction in place of one that stands."""
        made = Change(nf_tables.NFT_MSG_NEWTABLE, NFPROTO_INET, _MADE, _CREATED)
        return self._after(_change(nf_tables.NFT_MSG_DELTABLE, b""), made)

    def _after(self, *steps: Change) -> netlink.Batch:
        return nf_tables.transaction([*steps, *_objects(self.table), *_rules(self.table)])


def load(wanted: Loadable, *, replacing: bool) -> None:
    """Load the table, all of it or nothing. `replacing`: in the place of one that stands; else there must be none.

    Deleting one that is not there would cost the kernel's grace period. Raises OSError.
    """
    nf_tables.commit(wanted.replacement if replacing else wanted.creation)


def holds(wanted: Loadable) -> bool:
    """Whether the kernel holds exactly the table: every attribute, every rule, and no other. Raises OSError.

    When in doubt, no: a kernel that says more of a rule than those known so far.
    """
    if not _holds_table():
        return False
    said = [nf_tables.listed(kind, NFPROTO_INET, _TABLE + about) for kind, about in wanted.lists]
    if said == wanted.said:
        return True
    if _compare(wanted.table, [_attributes(each) for each in said]):
        wanted.said = said
        return True
    return False


def _compare(table: TableBytes, said: list[list[Attributes]]) -> bool:
    chains, rules, timeouts, sets, *elements = said
    listed = {each: wanted.attributes for each, wanted in table.sets.items()}
    anonymous = [wanted for each, wanted in table.sets.items() if each != nft.ANNOUNCED]
    return (
        _same_objects(table.chains, _by_name(chains, nf_tables.NFTA_CHAIN_NAME), _OF_CHAIN)
        and _same_rules(table.rules, rules)
        and _same_objects(table.timeouts, _by_name(timeouts, nf_tables.NFTA_OBJ_NAME), _OF_OBJECT)
        and _same_objects(listed, _by_name(sets, nf_tables.NFTA_SET_NAME), _OF_SET)
        and all(_members(each.elements) == _members(_lists(found)) for each, found in zip(anonymous, elements, strict=True))
    )


def _objects(table: TableBytes) -> Iterator[Change]:
    for chain, attributes in table.chains.items():
        yield _change(nf_tables.NFT_MSG_NEWCHAIN, name(nf_tables.NFTA_CHAIN_NAME, chain) + attributes)
    for timeout, attributes in table.timeouts.items():
        yield _change(nf_tables.NFT_MSG_NEWOBJ, name(nf_tables.NFTA_OBJ_NAME, timeout) + attributes)
    for number, (named, wanted) in enumerate(table.sets.items(), start=1):
        # The number is asked for though the name tells it.
        own = name(nf_tables.NFTA_SET_NAME, named)
        within = nlattr.attr(nf_tables.NFTA_SET_ID, number.to_bytes(4, "big"))
        yield _change(nf_tables.NFT_MSG_NEWSET, own + wanted.attributes + within)
        for elements in wanted.elements:
            listed = nlattr.nested(nf_tables.NFTA_SET_ELEM_LIST_ELEMENTS, elements)
            yield _change(nf_tables.NFT_MSG_NEWSETELEM, own + listed)


def _rules(table: TableBytes) -> Iterator[Change]:
    for chain, rules in table.rules.items():
        place = _TABLE + name(nf_tables.NFTA_RULE_CHAIN, chain)
        for rule in rules:
            about = place + nlattr.nested(nf_tables.NFTA_RULE_EXPRESSIONS, rule.expressions)
            about += nlattr.attr(nf_tables.NFTA_RULE_USERDATA, rule.userdata)
            yield Change(nf_tables.NFT_MSG_NEWRULE, NFPROTO_INET, about, _APPENDED)


def _change(kind: int, about: bytes) -> Change:
    return Change(kind, NFPROTO_INET, _TABLE + about, 0 if kind == nf_tables.NFT_MSG_DELTABLE else _CREATED)


def _attributes(payloads: Iterable[bytes]) -> list[Attributes]:
    # Kernels before 3.19 do not filter a dump by table.
    found = (nlattr.parse_attrs(payload) for payload in payloads)
    return [attributes for attributes in found if attributes.get(nf_tables.NFTA_TABLE_NAME) == _TABLE_NAME]


def _holds_table() -> bool:
    tables = _attributes(nf_tables.listed(nf_tables.NFT_MSG_GETTABLE, NFPROTO_INET))
    return any(found.get(nf_tables.NFTA_TABLE_FLAGS) == _NO_FLAGS for found in tables)


def _by_name(objects: Iterable[Attributes], name_is: int) -> dict[str, Attributes]:
    found = {}
    for attributes in objects:
        del attributes[nf_tables.NFTA_TABLE_NAME]
        found[text(attributes.pop(name_is))] = attributes
    return found


def _same_objects(wanted: Mapping[str, bytes], found: Mapping[str, Attributes], beside: frozenset[int]) -> bool:
    return wanted.keys() == found.keys() and all(_same(wanted[each], found[each], beside) for each in wanted)


def _same(wanted: bytes, found: Attributes, beside: frozenset[int]) -> bool:
    """Whether all of `wanted` is in `found`, in any order, and nothing else but what is `beside` it."""
    return nlattr.parse_attrs(wanted) == {kind: value for kind, value in found.items() if kind not in beside}


def _same_rules(wanted: Mapping[str, tuple[RuleBytes, ...]], rules: Iterable[Attributes]) -> bool:
    found: dict[str, list[Attributes]] = {chain: [] for chain in wanted}
    for attributes in rules:
        found.setdefault(text(attributes[nf_tables.NFTA_RULE_CHAIN]), []).append(attributes)
    return wanted.keys() == found.keys() and all(
        len(found[chain]) == len(these) and all(map(_same_rule, these, found[chain])) for chain, these in wanted.items()
    )


def _same_rule(wanted: RuleBytes, found: Attributes) -> bool:
    if found.get(nf_tables.NFTA_RULE_USERDATA) != wanted.userdata:
        return False
    expressions = found.get(nf_tables.NFTA_RULE_EXPRESSIONS, b"")
    # As long as no packet has been counted.
    return wanted.expressions == expressions or _same_expressions(wanted.expressions, expressions)


def _same_expressions(wanted: bytes, found: bytes) -> bool:
    these, those = nlattr.attrs(wanted), nlattr.attrs(found)
    pairs = zip(these, those, strict=False)
    return len(these) == len(those) and all(
        this == that or _same_expression(nlattr.parse_attrs(this), nlattr.parse_attrs(that)) for (_, this), (_, that) in pairs
    )


def _same_expression(wanted: Attributes, found: Attributes) -> bool:
    kind = wanted[NFTA_EXPR_NAME]
    beside = _OF_EXPRESSION.get(kind, _NONE)
    these, those = (nlattr.parse_attrs(each.get(NFTA_EXPR_DATA, b"")) for each in (wanted, found))
    return found.get(NFTA_EXPR_NAME) == kind and all(
        these.get(number) == those.get(number) for number in (these.keys() | those.keys()) - beside
    )


def _lists(found: Iterable[Attributes]) -> Iterator[bytes]:
    for attributes in found:
        yield attributes.get(nf_tables.NFTA_SET_ELEM_LIST_ELEMENTS, b"")


def _members(lists: Iterable[bytes]) -> set[frozenset[tuple[int, bytes]]]:
    """The elements, which come in any order, each as its attributes."""
    return {frozenset(nlattr.attrs(element)) for each in lists for _, element in nlattr.attrs(each)}
