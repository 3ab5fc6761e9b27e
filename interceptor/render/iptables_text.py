"""The words of iptables rules: how one is split, written, and taken apart. No I/O, no plan.

iptables-save quotes a word only if it must and escapes quotes and apostrophes; two writings of one rule are equal by words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A run of quoted and bare pieces; inside quotes a backslash takes the next character literally (xtables_save_string).
_WORD = re.compile(r'(?:"(?:\\.|[^"\\])*"|[^\s"])+')
_PIECE = re.compile(r'"((?:\\.|[^"\\])*)"|([^"]+)')
_ESCAPED = re.compile(r"\\(.)")
_NEEDS_QUOTES = re.compile(r"""[\s"'\\]|^$""")
_ENDPOINTS = {"-s": "src", "-d": "dst", "-i": "in_interface", "-o": "out_interface", "-p": "protocol"}


@dataclass(frozen=True, slots=True)
class Module:
    """A match or target with its options in order: (option without dashes, its values); a value "!" first negates it."""

    name: str
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class RuleParts:
    """A rule as libiptc takes it. `endpoints`: src, dst, in_interface, out_interface, protocol; a leading "!" negates."""

    endpoints: dict[str, str]
    matches: tuple[Module, ...]
    target: Module
    goto: bool


def words(text: str) -> list[str]:
    """The words of a rule, unquoted."""
    return [
        "".join(_ESCAPED.sub(r"\1", quoted) if quoted else bare for quoted, bare in _PIECE.findall(word))
        for word in _WORD.findall(text)
    ]


def join(parts: list[str]) -> str:
    """Words as one line, each quoted if it must be: the inverse of words(), and a rule's normal form."""
    return " ".join(_quoted(part) for part in parts)


def _quoted(word: str) -> str:
    if not _NEEDS_QUOTES.search(word):
        return word
    escaped = re.sub(r'(["\\])', r"\\\1", word)
    return f'"{escaped}"'


def normalised(text: str) -> str:
    """The same text for two writings of one rule."""
    return join(words(text))


def parts(spec: str) -> RuleParts:
    """A rule, without the chain that it is in, taken apart. Raises ValueError for what our rules do not contain."""
    endpoints: dict[str, str] = {}
    modules: list[tuple[str, list[tuple[str, tuple[str, ...]]]]] = []
    target, goto, negated = -1, False, ""
    rest = words(spec)
    while rest:
        word = rest.pop(0)
        if word == "!":
            negated = "!"
            continue
        if word in _ENDPOINTS:
            endpoints[_ENDPOINTS[word]] = negated + rest.pop(0)
        elif word in ("-m", "-j", "-g"):
            if word != "-m":
                target, goto = len(modules), word == "-g"
            modules.append((rest.pop(0), []))
        elif word.startswith("--") and modules:
            values = [negated] if negated else []
            while rest and rest[0] != "!" and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            modules[-1][1].append((word[2:], tuple(values)))
        else:
            raise ValueError(f"iptables rule {spec!r}: {word!r} is not understood")
        negated = ""
    if target != len(modules) - 1 or target < 0:
        raise ValueError(f"iptables rule {spec!r}: it does not end in a target")
    typed = [Module(name, tuple(options)) for name, options in modules]
    return RuleParts(endpoints, tuple(typed[:-1]), typed[-1], goto)


def spec(rule: RuleParts) -> str:
    """The inverse of parts(), as iptables-save orders it."""
    line: list[str] = []
    for flag, name in _ENDPOINTS.items():
        if name in rule.endpoints:
            line += _negatable(flag, rule.endpoints[name])
    for match in rule.matches:
        line += ["-m", match.name, *_options(match)]
    line += ["-g" if rule.goto else "-j", rule.target.name, *_options(rule.target)]
    return join(line)


def _negatable(flag: str, value: str) -> list[str]:
    return ["!", flag, value[1:]] if value.startswith("!") else [flag, value]


def _options(module: Module) -> list[str]:
    line: list[str] = []
    for name, values in module.options:
        negated = values[:1] == ("!",)
        line += [*(["!"] if negated else []), f"--{name}", *values[negated:]]
    return line
