"""Our chains in iptables-nft's tables, taken away over netlink: for when the programs that wrote them are gone.

One transaction for both families; what it cannot take whole it leaves whole. Expressions: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from interceptor import nlattr
from interceptor.backends import builtin_chains, nf_tables, timeouts_in_use
from interceptor.backends.nf_tables import Change, name, text
from interceptor.errors import BackendError
from interceptor.render.iptables_save import NEW
from interceptor.render.names import IPTABLES_PREFIX
from interceptor.values import Family

NFTA_LIST_ELEM = 1
NFTA_EXPR_NAME = 1
NFTA_EXPR_DATA = 2
NFTA_IMMEDIATE_DATA = 2
NFTA_DATA_VERDICT = 2
NFTA_VERDICT_CHAIN = 2
JUMP_ALONE = 2  # expressions: iptables-nft counts in each rule, too
JUMP = b"immediate\0"  # a jump is an immediate verdict


@dataclass(frozen=True, slots=True)
class _Rule:
    table: str
    chain: str
    handle: bytes
    targets: frozenset[str]  # chains that it leads to
    expressions: int


def remove() -> tuple[str, ...]:
    """Take our chains away, and what leads into them; of the latter those that were not ours, as text. Raises BackendError."""
    steps: list[Change] = []
    strays: list[str] = []
    for family in Family:
        number = nf_tables.ADDRESS_FAMILIES[family]
        chains = list(_chains(number))
        for rule in _rules(number):
            if (rule.table, rule.chain) not in chains and any((rule.table, target) in chains for target in rule.targets):
                about = _place(rule.table, rule.chain) + nlattr.attr(nf_tables.NFTA_RULE_HANDLE, rule.handle)
                steps.append(Change(nf_tables.NFT_MSG_DELRULE, number, about))
                if rule.expressions > JUMP_ALONE:
                    strays.append(f"{family.value} {rule.table}/{rule.chain}: a rule into {', '.join(sorted(rule.targets))}")
        # Without a handle: all of the chain's rules. All chains are emptied first, for they jump to each other.
        steps += [Change(nf_tables.NFT_MSG_DELRULE, number, _place(*chain)) for chain in chains]
        steps += [
            Change(
                nf_tables.NFT_MSG_DELCHAIN,
                number,
                name(nf_tables.NFTA_CHAIN_TABLE, table) + name(nf_tables.NFTA_CHAIN_NAME, chain),
            )
            for table, chain in chains
        ]
    try:
        if steps:
            nf_tables.change(steps)
    except OSError as error:
        raise BackendError(f"removing what iptables-nft left: {error.strerror or error}. Nothing was changed") from error
    for family in Family:
        builtin_chains.remove_unused(family)
    timeouts_in_use.remove_unused("legacy")
    return tuple(strays)


def _place(table: str, chain: str) -> bytes:
    return name(nf_tables.NFTA_RULE_TABLE, table) + name(nf_tables.NFTA_RULE_CHAIN, chain)


def _chains(family: int) -> Iterator[tuple[str, str]]:
    for payload in nf_tables.listed(nf_tables.NFT_MSG_GETCHAIN, family):
        attributes = nlattr.parse_attrs(payload)
        chain = text(attributes[nf_tables.NFTA_CHAIN_NAME])
        if chain.startswith(IPTABLES_PREFIX) and not chain.startswith(NEW):
            yield text(attributes[nf_tables.NFTA_CHAIN_TABLE]), chain


def _rules(family: int) -> Iterator[_Rule]:
    for payload in nf_tables.listed(nf_tables.NFT_MSG_GETRULE, family):
        attributes = nlattr.parse_attrs(payload)
        expressions = list(nlattr.attrs(attributes.get(nf_tables.NFTA_RULE_EXPRESSIONS, b"")))
        yield _Rule(
            text(attributes[nf_tables.NFTA_RULE_TABLE]),
            text(attributes[nf_tables.NFTA_RULE_CHAIN]),
            attributes[nf_tables.NFTA_RULE_HANDLE],
            frozenset(target for _, expression in expressions for target in _target(expression)),
            len(expressions),
        )


def _target(expression: bytes) -> Iterator[str]:
    attributes = nlattr.parse_attrs(expression)
    if attributes.get(NFTA_EXPR_NAME) != JUMP:
        return
    for kind in (NFTA_EXPR_DATA, NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT):
        attributes = nlattr.parse_attrs(attributes.get(kind, b""))
    if NFTA_VERDICT_CHAIN in attributes:
        yield text(attributes[NFTA_VERDICT_CHAIN])
