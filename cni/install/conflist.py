"""Our entry in a conflist, put in and taken out as text, so that every other byte stays as its owner wrote it. Pure.

Parsing and writing anew would be simpler, and lose what JSON does not carry: the order of equal keys, 1.0 and 1e3, indentation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # documented in json.decoder's source, stable since 3.0
from typing import Any

from cni import strict_json

TYPE = "interceptor-cni"
_WHITESPACE = " \t\n\r"
_decoder = json.JSONDecoder()


class ConflistError(ValueError):
    """The text is no network configuration that a runtime would load; the text says why."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A value in the text: where it begins and ends."""

    start: int
    end: int
    value: Any


def validate(text: str) -> dict[str, Any]:
    """The configuration in `text`, if a runtime would load it as a list: a name, and plugins that each have a type.

    Raises ConflistError.
    """
    found = _loaded(text)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        raise ConflistError("not a JSON object with a name")
    plugins = found.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        raise ConflistError("it has no list of plugins")
    if not all(isinstance(plugin, dict) and isinstance(plugin.get("type"), str) and plugin["type"] for plugin in plugins):
        raise ConflistError("a plugin in it has no type")
    return found


def has_entry(text: str, entry: dict[str, Any]) -> bool:
    """Whether `entry` stands in the list once, unchanged and last. Raises ConflistError."""
    plugins = validate(text)["plugins"]
    ours = [plugin for plugin in plugins if plugin["type"] == TYPE]
    return ours == [entry] and plugins[-1] == entry


def with_entry(text: str, entry: dict[str, Any]) -> str:
    """`text` with `entry` as the last plugin, and no other entry of ours. Raises ConflistError."""
    if has_entry(text, entry):
        return text
    text = without_entry(text)
    last = list(_plugins(text))[-1]
    indent = _indent(text, last.start)
    shown = json.dumps(entry, indent=2 if indent else None).replace("\n", f"\n{indent}" if indent else "\n")
    return f"{text[: last.end]},{f'{chr(10)}{indent}' if indent else ' '}{shown}{text[last.end :]}"


def without_entry(text: str) -> str:
    """`text` without any entry of ours; byte for byte what it was before with_entry(). Raises ConflistError.

    A list that holds nothing but ours is nobody's: it is refused.
    """
    validate(text)
    members = list(_plugins(text))
    kept = [member for member in members if member.value["type"] != TYPE]
    if not kept:
        raise ConflistError("it holds no plugin but ours")
    if len(kept) == len(members):
        return text
    # Each entry goes with what parts it from its neighbour: the one before, or for the first the one after.
    for index in reversed(range(len(members))):
        if members[index].value["type"] == TYPE:
            start = members[index - 1].end if index else members[index].start
            end = members[index].end if index else members[index + 1].start
            text = text[:start] + text[end:]
            members = list(_plugins(text))
    return text


def as_list(text: str, entry: dict[str, Any], origin: str) -> str:
    """A conflist of our own that holds the single configuration in `text`, then `entry`. Raises ConflistError.

    `origin` names the file it was made from, for who finds it.
    """
    found = _loaded(text)
    if not isinstance(found, dict) or not isinstance(found.get("type"), str) or not found["type"]:
        raise ConflistError("not a JSON object with a type")
    if not isinstance(found.get("name"), str) or not found["name"]:
        raise ConflistError("it has no name")
    plugin = {key: value for key, value in found.items() if key not in ("cniVersion", "name")}
    made: dict[str, Any] = {"cniVersion": found["cniVersion"]} if "cniVersion" in found else {}
    made |= {"name": found["name"], ORIGIN_KEY: origin, "plugins": [plugin, entry]}
    return json.dumps(made, indent=2) + "\n"


ORIGIN_KEY = "interceptor.io/made-from"


def _loaded(text: str) -> Any:
    try:
        return strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConflistError(f"not JSON: {error}") from error


def _plugins(text: str) -> Iterator[_Member]:
    for key, member in _members(text):
        if key == "plugins":
            plugins = member
    yield from _items(text, plugins)


def _members(text: str) -> Iterator[tuple[str, _Member]]:
    """Each key of the object in `text` and its value. `text` is known to be an object."""
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = scanstring(text, at + 1, True)
        at = _skip(text, _skip(text, at) + 1)  # over the colon
        value, end = _decoder.raw_decode(text, at)
        yield key, _Member(at, end, value)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _items(text: str, array: _Member) -> Iterator[_Member]:
    at = _skip(text, array.start + 1)
    while text[at] != "]":
        value, end = _decoder.raw_decode(text, at)
        yield _Member(at, end, value)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while text[at] in _WHITESPACE:
        at += 1
    return at


def _indent(text: str, start: int) -> str:
    """The white space before a value that begins its line; "" for one that does not."""
    before = text[:start].rpartition("\n")
    return before[2] if before[1] and before[2].strip(_WHITESPACE) == "" else ""
