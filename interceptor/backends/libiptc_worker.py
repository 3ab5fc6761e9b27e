"""`python -I -m interceptor.backends.libiptc_worker v4`: save and restore one IP family's legacy tables by python-iptables.

A process of its own for each family, for python-iptables' defects (1.2): extensions work for the first family of a process
only, tables are cached across namespaces, and with autocommit refusals by the kernel are lost.
Answers each line of stdin with one on stdout, both JSON, until stdin ends. Knows nothing of plans.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from interceptor.backends import libiptc_import, xtables_lock
from interceptor.render.iptables_save import Step, listing, steps
from interceptor.render.iptables_text import Module, RuleParts, parts, spec
from interceptor.render.names import IPTABLES_PREFIX
from interceptor.values import Family, kernel_text

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_WAIT_S = 30.0
LOCK_POLL_S = 0.05
EXISTING = {Family.V4: "/proc/thread-self/net/ip_tables_names", Family.V6: "/proc/thread-self/net/ip6_tables_names"}
ENDPOINTS = ("src", "dst", "in_interface", "out_interface", "protocol")


def main() -> int:
    """Answer requests: {"verb", "text"} -> {"text"} or {"error"}."""
    family = Family(sys.argv[1])
    # Only answers go to stdout, whatever an extension prints.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"text": save(family) if request["verb"] == "save" else restore(family, request["text"])}
        except Exception as error:  # noqa: BLE001  the edge of a process: the parent raises it as a BackendError
            answer = {"error": str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # python-iptables' handles are freed in any order at exit, which may crash; all that matters is committed.
    os._exit(0)


def save(family: Family) -> str:
    """Our chains and jumps in the tables that exist, as iptables-save writes them. Creates no table."""
    return "".join(_listed(_table(family, name)) for name in _existing_tables(family))


def restore(family: Family, text: str) -> str:
    """What iptables-restore --noflush does with our restore text; one transaction a table."""
    # python-iptables takes no lock; without it somebody writing at the same moment would be overwritten silently.
    with _locked():
        for name, table_steps in steps(text):
            table = _table(family, name)
            built_in = [chain for chain in table.chains if chain.is_builtin()]
            counters = [(chain.name, chain.get_policy().name, chain.get_counters()) for chain in built_in]
            for step in table_steps:
                _take(family, table, step)
            # libiptc would set these to 0 with the commit.
            for chain, policy, counts in counters:
                table.set_policy(chain, policy, counts)
            table.commit()
    return ""


@contextmanager
def _locked() -> Iterator[None]:
    if xtables_lock.cannot_be():
        yield
        return
    with open(xtables_lock.PATH, "a", encoding="ascii") as lock:
        _wait_for(lock.fileno())
        yield


def _wait_for(lock: int) -> None:
    """Take it, or see that who has it does not touch this namespace's tables."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if xtables_lock.is_held_elsewhere():
                return
            if time.monotonic() > deadline:
                raise
            time.sleep(LOCK_POLL_S)
        else:
            return


def _existing_tables(family: Family) -> list[str]:
    try:
        with open(EXISTING[family], encoding="ascii") as names:
            return names.read().split()
    except OSError:
        return []


# python-iptables has no types.
def _table(family: Family, name: str) -> Any:
    try:
        libiptc_import.load()
    except (ImportError, OSError, AttributeError) as error:  # AttributeError: a library of another version
        raise RuntimeError(
            f"it cannot be loaded ({error}). It needs libxtables, libip4tc and libip6tc: install the package iptables"
        ) from error
    import iptc

    table = (iptc.Table if family is Family.V4 else iptc.Table6)(name, autocommit=False)
    # Objects are cached; one that was committed still holds what it read before.
    table.refresh()
    return table


def _listed(table: Any) -> str:
    chains: dict[str, list[str]] = {}
    leading: list[tuple[str, str]] = []
    for chain in table.chains:
        if chain.name.startswith(IPTABLES_PREFIX):
            chains[chain.name] = [spec(_parts(rule)) for rule in chain.rules]
        else:
            leading += [(chain.name, text) for text, _ in _leading(chain)]
    return listing(table.name, chains, leading)


def _leading(chain: Any) -> Iterator[tuple[str, Any]]:
    """The rules that lead into our chains, each with its text.

    Others are not looked into: saving some extensions crashes (NFLOG). For the same reason a stray's text names its matches
    without their options: enough to show it and to find it again.
    """
    for rule in chain.rules:
        if rule.target.name.startswith(IPTABLES_PREFIX):
            matches = tuple(Module(match.name) for match in rule.matches)
            yield spec(RuleParts(_endpoints(rule), matches, Module(rule.target.name), rule.target.goto)), rule


def _parts(rule: Any) -> RuleParts:
    matches = tuple(Module(match.name, _options(match)) for match in rule.matches)
    target = Module(rule.target.name, () if rule.target.name in ("RETURN", "DROP") else _options(rule.target))
    return RuleParts(_endpoints(rule), matches, target, rule.target.goto)


def _endpoints(rule: Any) -> dict[str, str]:
    anything = (None, "", "ip", "0.0.0.0/0.0.0.0", "::/0", "0.0.0.0/0")
    given = {name: getattr(rule, name) for name in ENDPOINTS}
    return {name: _with_length(str(value)) for name, value in given.items() if value not in anything}


def _with_length(value: str) -> str:
    """127.0.0.0/255.0.0.0 as 127.0.0.0/8, the way iptables-save writes it."""
    from ipaddress import ip_network

    if "/" not in value:
        return value
    negated = "!" if value.startswith("!") else ""
    network = ip_network(value.removeprefix("!"), strict=False)
    return f"{negated}{kernel_text(network.network_address)}/{network.prefixlen}"


def _options(module: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    # The extension prints itself as iptables-save does; python-iptables leaves the escape of an apostrophe in.
    given = module.get_all_parameters()
    return tuple((name, tuple(value.replace("\\'", "'") for value in values)) for name, values in given.items())


def _take(family: Family, table: Any, step: Step) -> None:
    import iptc

    chain = iptc.Chain(table, step.chain)
    match step.verb:
        case "make":
            if table.is_chain(step.chain):
                table.flush_entries(step.chain)
            else:
                table.create_chain(step.chain)
        case "drop":
            table.delete_chain(step.chain)
        case "delete jump" | "delete stray":
            wanted = step.rest if step.verb == "delete stray" else f"-j {step.rest}"
            rule = next(rule for text, rule in _leading(chain) if text == wanted)
            table.delete_entry(step.chain, rule.rule, rule.mask)
        case "insert jump":
            jump = RuleParts({}, (), Module(step.rest), goto=False)
            table.insert_entry(step.chain, _rule(family, chain, jump).rule, step.place - 1)
        case "append":
            table.append_entry(step.chain, _rule(family, chain, parts(step.rest)).rule)


def _rule(family: Family, chain: Any, wanted: RuleParts) -> Any:
    import iptc

    rule = (iptc.Rule if family is Family.V4 else iptc.Rule6)(chain=chain)
    for name, value in wanted.endpoints.items():
        setattr(rule, name, value)
    if family is Family.V6:
        _compare_whole_names(rule.entry.ipv6, wanted.endpoints)
    for module in wanted.matches:
        _set_options(rule.create_match(module.name), module)
    target = iptc.Target(rule, wanted.target.name, goto=wanted.goto)
    _set_options(target, wanted.target)
    rule.target = target
    return rule


def _compare_whole_names(header: Any, endpoints: dict[str, str]) -> None:
    # Rule6 masks each character with 0x01 where Rule has 0xff: `-i lo` would match virt0, too, and let it go uncaptured.
    for name, mask in (("in_interface", "iniface_mask"), ("out_interface", "outiface_mask")):
        if name in endpoints:
            setattr(header, mask, b"\xff" * (len(endpoints[name]) + 1))


def _set_options(extension: Any, wanted: Module) -> None:
    for name, values in wanted.options:
        extension.set_parameter(name, list(values))
    # The public final_check() first sets every option once more from its printed form, apostrophes escaped.
    extension._final_check()  # noqa: SLF001


if __name__ == "__main__":
    sys.exit(main())
