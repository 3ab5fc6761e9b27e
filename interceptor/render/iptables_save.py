"""Read iptables-save and iptables-restore text: what of it is ours, and which steps it asks for. No I/O.

Ours are the chains whose names start with IPTABLES_PREFIX, and the bare jumps to them from other chains; other rules that lead
into them are strays, somebody else's but of no use without our chains. In iptables-nft's tables there are also markers, empty
chains that say which built-in chain did not exist before us: see NEW.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from interceptor.render.iptables_text import normalised, words
from interceptor.render.names import IPTABLES_PREFIX

# iptables-nft creates its tables and built-in chains with the first rule in them and never takes them away.
# INTERCEPT_NEW_OUTPUT says that OUTPUT is there for our sake only, INTERCEPT_NEW_TABLE that the whole table is. In the
# kernel, so that a clean by another process, after a crash or an upgrade, knows it.
NEW = IPTABLES_PREFIX + "NEW_"
NEW_TABLE = NEW + "TABLE"

Verb = Literal["make", "delete jump", "delete stray", "insert jump", "append", "drop"]
_VERBS: dict[str, Verb] = {"-D": "delete jump", "-I": "insert jump", "-A": "append", "-X": "drop"}


@dataclass(slots=True)
class TableRules:
    """What one iptables table holds of ours: chains with their rules, and the one jump from each built-in chain."""

    chains: dict[str, list[str]] = field(default_factory=dict)
    jumps: dict[str, list[str]] = field(default_factory=dict)  # built-in chain -> our chains, in order
    # Built-in chain -> how many rules of others stand before our first jump: they may take packets away from us.
    behind: dict[str, int] = field(default_factory=dict, compare=False)
    # Chain that is not ours -> rules of others in it that lead into our chains, other than by the bare jump.
    strays: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of restore text. `rest`: the target chain of a jump, the rule to append or the stray to delete, else empty.

    "make" creates the chain, or empties it when it is there.
    """

    verb: Verb
    chain: str
    rest: str = ""
    place: int = 1  # of an inserted jump, counted from 1


def parse(text: str) -> dict[str, TableRules]:
    """What iptables-save lists of ours, by table; tables without any are absent. Markers are left out."""
    found: dict[str, TableRules] = {}
    for name, lines in _sections(text):
        table = TableRules()
        for line in lines:
            if line.startswith(f":{IPTABLES_PREFIX}") and not line.startswith(f":{NEW}"):
                table.chains[line[1:].split()[0]] = []
            elif line.startswith("-A "):
                _add_rule(table, line[len("-A ") :])
        if table.chains or table.jumps or table.strays:
            found[name] = table
    return found


def _add_rule(table: TableRules, line: str) -> None:
    chain, _, rule = line.partition(" ")
    if chain in table.chains:
        table.chains[chain].append(rule)
        return
    match words(rule):
        case ["-j", target] if target.startswith(IPTABLES_PREFIX):
            table.jumps.setdefault(chain, []).append(target)
        case [*_, "-j" | "-g", target] if target.startswith(IPTABLES_PREFIX):
            table.strays.setdefault(chain, []).append(rule)
        case _ if chain not in table.jumps:
            table.behind[chain] = table.behind.get(chain, 0) + 1


def leftovers(text: str) -> Iterator[str]:
    """Tables ("nat") in which nothing of ours is left but markers."""
    for name, lines in _sections(text):
        ours = [line[1:].split()[0] for line in lines if line.startswith(f":{IPTABLES_PREFIX}")]
        if ours and all(chain.startswith(NEW) for chain in ours):
            yield name


def names_timeout(tables: Mapping[str, TableRules], policy: str) -> bool:
    """Whether some rule gives connections the conntrack timeout `policy`."""
    rules = (rule for table in tables.values() for chain in table.chains.values() for rule in chain)
    return any(words(rule)[-2:] == ["--timeout", policy] for rule in rules)


def observed(tables: Mapping[str, TableRules]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """("nat/INTERCEPT_OUTPUT", its rules in normal form), and for another's chain our jumps and the strays."""
    for name, table in tables.items():
        for hook in dict.fromkeys((*table.jumps, *table.strays)):
            jumps = [f"-j {target}" for target in table.jumps.get(hook, [])]
            others = table.behind.get(hook, 0) if jumps else 0
            first = (f"(behind {others} of others' rules)",) if others else ()
            yield f"{name}/{hook}", (*first, *jumps, *map(normalised, table.strays.get(hook, [])))
        for chain, rules in table.chains.items():
            yield f"{name}/{chain}", tuple(normalised(rule) for rule in rules)


def marked(text: str, existing: Mapping[str, Collection[str]]) -> str:
    """Restore text that also leaves markers for the tables and built-in chains it brings into being.

    `existing`: table -> its chains, as they are now.
    """
    lines: list[str] = []
    for name, section in _sections(text):
        entered = [step.chain for step in _steps(section) if step.verb == "insert jump"]
        new = [NEW + chain for chain in entered if chain not in existing.get(name, ())]
        if entered and name not in existing:
            new.append(NEW_TABLE)
        lines += [f"*{name}", *(f":{marker} - [0:0]" for marker in dict.fromkeys(new)), *section, "COMMIT"]
    return "\n".join((*lines, ""))


def counted(text: str, saved: str) -> str:
    """Restore text that also keeps the built-in chains' own counters, as `saved` by iptables-save.

    That means to set their policy, too: only where it is ACCEPT, so that no DROP of a moment ago can be undone.
    """
    policies = {
        name: [line for line in lines if line.startswith(":") and " ACCEPT [" in line] for name, lines in _sections(saved)
    }
    lines: list[str] = []
    for name, section in _sections(text):
        lines += [f"*{name}", *policies.get(name, ()), *section, "COMMIT"]
    return "\n".join((*lines, ""))


def steps(text: str) -> Iterator[tuple[str, list[Step]]]:
    """Each table's steps of restore text, in order: one transaction each. Raises ValueError for a line not of our making."""
    for name, lines in _sections(text):
        yield name, list(_steps(lines))


def _steps(lines: list[str]) -> Iterator[Step]:
    for line in lines:
        flag, _, after = line.partition(" ")
        chain, _, rest = after.partition(" ")
        verb = _VERBS.get(flag)
        if flag.startswith(":"):
            yield Step("make", flag[1:])
        elif verb == "insert jump":
            place, _, target = words(rest)
            yield Step(verb, chain, target, int(place))
        elif verb == "delete jump":
            bare = len(words(rest)) == 2 and rest.startswith("-j ")
            yield Step(verb, chain, words(rest)[-1]) if bare else Step("delete stray", chain, rest)
        elif verb is not None:
            yield Step(verb, chain, rest)
        else:
            raise ValueError(f"restore text: {line!r} is not understood")


def listing(table: str, chains: Mapping[str, list[str]], leading: list[tuple[str, str]]) -> str:
    """One table as iptables-save writes it: our chains with their rules, and (chain of others, rule that leads into ours)."""
    lines = [f"*{table}", *(f":{chain} - [0:0]" for chain in chains)]
    lines += [f"-A {hook} {rule}" for hook, rule in leading]
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    return "\n".join((*lines, "COMMIT", ""))


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in text.splitlines():
        if line.startswith("*"):
            name, lines = line[1:].strip(), []
        elif line == "COMMIT":
            yield name, lines
        elif line and not line.startswith("#"):
            lines.append(line)
