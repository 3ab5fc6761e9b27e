"""Where option values come from: file, environment, annotations, flags. Each gives texts; resolve() makes them one Config.

The environment is read here and nowhere else but in cni/protocol.py. Which options there are is config.py's business.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from interceptor.config import FIELD, FIELDS, Config, Field, Names, find_contradictions
from interceptor.errors import ConfigError, Problem

ANNOTATION_PREFIX = "interceptor.io/"
ENV_PREFIX = "INTERCEPTOR_"
FILE_SIZE_MAX = 1 << 20  # a list of all 65535 ports is 382 KB; /dev/zero has no end
# What Kubernetes sets in every pod for a Service that is called interceptor or interceptor-… (kubelet/envvars/envvars.go).
# Only the last form could be an option of ours; its value tells: tcp://10.0.0.1:80.
# As texts: compiled when one is first asked for, which is seldom.
_SERVICE_NAME = r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
_SERVICE_URL = r"(tcp|udp|sctp)://.*"


@dataclass(frozen=True, slots=True)
class Given:
    """An option's value before it is parsed."""

    text: str
    origin: str  # "environment INTERCEPTOR_PROXY_UID"
    place: str  # the option as the user wrote it, for a Problem


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source gives: option name -> value, and what is wrong with the source itself.

    A value of None: the source means to give one, and nobody can tell which.
    """

    values: dict[str, Given | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The Config, and for each option the text of where its value came from: "default", "file /etc/x.yaml", …"""

    config: Config
    origin: dict[str, str]

    def shown(self) -> dict[str, dict[str, str]]:
        """Option -> its value as text, and where it came from."""
        return {
            row.name: {"value": row.kind.show(getattr(self.config, row.name)), "origin": self.origin[row.name]}
            for row in FIELDS
        }


def resolve(
    *,
    files: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
    names: Names | None = None,
    objects: Sequence[Layer] = (),
    judge: Callable[[Mapping[str, Any]], Iterable[Problem]] = lambda _good: (),
) -> Resolved:
    """One Config from all sources; None for `environment` is this process's own, `objects` come after the files.

    Raises one ConfigError with all problems: bad sources, bad values, and contradictions between those that are good. Values
    that another source overrides are not judged. `judge` is told the good values, to add problems of its own.
    """
    layers = [
        # Precedence: default < file (later over earlier) < environment < annotation < flag.
        *(from_file(path) for path in files),
        *objects,
        from_environment(os.environ if environment is None else environment),
        from_annotations(annotations or {}),
        from_flags(flags or {}),
    ]
    given = {name: value for layer in layers for name, value in layer.values.items()}
    problems = [problem for layer in layers for problem in layer.problems]
    good = {row.name: row.default for row in FIELDS if row.name not in given}
    good |= _parse(given, names or local_names(), problems)
    places = {FIELD[name].flag: value.place for name, value in given.items() if value is not None}
    problems += (replace(found, option=places.get(found.option, found.option)) for found in find_contradictions(good))
    problems += judge(good)
    if problems:
        raise ConfigError(problems)
    origin = {name: value.origin for name, value in given.items() if value is not None}
    return Resolved(Config(**good), {row.name: origin.get(row.name, "default") for row in FIELDS})


def _parse(given: Mapping[str, Given | None], names: Names, problems: list[Problem]) -> dict[str, Any]:
    values = {}
    for name, value in given.items():
        if value is None:
            continue
        try:
            values[name] = FIELD[name].kind.parse(value.text, names)
        except ValueError as error:
            problems.append(Problem(value.place, value.text, str(error)))
    return values


def from_flags(flags: Mapping[str, Sequence[str]]) -> Layer:
    """From the command line: option name -> the texts of its occurrences."""
    layer = Layer()
    for name, texts in flags.items():
        option = FIELD[name]
        text = texts[-1] if option.kind.separator is None else option.kind.separator.join(texts)
        layer.values[name] = Given(text, f"flag {option.flag}", option.flag)
    return layer


def from_environment(environment: Mapping[str, str]) -> Layer:
    """From INTERCEPTOR_* variables. An unknown one is a problem, unless Kubernetes set it for a Service."""
    ours = {
        name: value
        for name, value in environment.items()
        if name.startswith(ENV_PREFIX) and not re.fullmatch(_SERVICE_NAME, name) and not re.fullmatch(_SERVICE_URL, value)
    }
    return _from_names(ours, {option.env: option for option in FIELDS}, "environment")


def from_annotations(annotations: Mapping[str, str]) -> Layer:
    """From a pod's annotations; those of other programs are ignored, an unknown one of ours is a problem."""
    ours = {name: value for name, value in annotations.items() if name.startswith(ANNOTATION_PREFIX)}
    return _from_names(ours, {option.annotation: option for option in FIELDS}, "annotation")


def _from_names(given: Mapping[str, str], known: Mapping[str, Field], source: str) -> Layer:
    layer = Layer()
    for name, text in given.items():
        if name in known:
            layer.values[known[name].name] = Given(text, f"{source} {name}", name)
        else:
            _add_unknown(layer, name, text, name, known)
    return layer


def _add_unknown(layer: Layer, place: str, value: str, written: str, known: Mapping[str, Field]) -> None:
    import difflib  # 2 ms

    close = difflib.get_close_matches(written, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`interceptor config` lists all"
    layer.problems.append(Problem(place, value, f"no such option; {hint}"))
    if close:
        layer.values.setdefault(known[close[0]].name, None)


YAML_NULLS = ("", "~", "null", "Null", "NULL")
# A value in a file: one text, a list of texts, or None for what can't be an option's value.
_Value: TypeAlias = str | list[str] | None


@dataclass(frozen=True, slots=True)
class _Entry:
    place: str
    key: str
    value: _Value


def from_file(path: str) -> Layer:
    """From a YAML or JSON file; `-` is standard input. Keys are option names, with _ or -."""
    shown = "standard input" if path == "-" else path
    try:
        entries = _entries(_read(path), shown)
    except OSError as error:
        return _unreadable(path, error.strerror or str(error))
    except (ValueError, RecursionError) as error:
        return _unreadable(path, " ".join(str(error).split()))
    return _from_entries(entries, f"file {shown}")


def from_object(found: Mapping[str, object], place: str) -> Layer:
    """From a JSON object that was read already (a conflist's `capture`): keys and values are as in a file."""
    entries = [_Entry(f"{place}.{key}", key, _plain(value, _json_scalar)) for key, value in found.items()]
    return _from_entries(entries, place)


def _from_entries(entries: Iterable[_Entry], origin: str) -> Layer:
    layer = Layer()
    for entry in entries:
        _add(layer, entry, origin)
    return layer


def _unreadable(path: str, reason: str) -> Layer:
    # It may have meant to give any option.
    return Layer(dict.fromkeys(FIELD), [Problem("--config", path, reason)])


def _add(layer: Layer, entry: _Entry, origin: str) -> None:
    name, value = entry.key.replace("-", "_"), entry.value
    if name not in FIELD:
        _add_unknown(layer, entry.place, _shown(value), name, FIELD)
        return
    separator = FIELD[name].kind.separator
    if isinstance(value, list) and separator is not None:
        value = separator.join(value)
    before = layer.values.get(name)
    if before is not None:
        layer.problems.append(Problem(entry.place, _shown(entry.value), f"stands at {before.place} already"))
    elif isinstance(value, str):
        layer.values[name] = Given(value, origin, entry.place)
    else:
        wanted = "one value" if separator is None else "one value, or a list of them ([] for none)"
        layer.problems.append(Problem(entry.place, _shown(entry.value), f"takes {wanted}; leave the key out for the default"))
        layer.values[name] = None


def _shown(value: _Value) -> str:
    return ",".join(value) if isinstance(value, list) else value or ""


def _read(path: str) -> str:
    """Raises OSError, or ValueError for what can be no configuration."""
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    if path == "-":
        read = sys.stdin.buffer.read(FILE_SIZE_MAX + 1)
    else:
        with open(path, "rb") as file:
            read = file.read(FILE_SIZE_MAX + 1)
    if len(read) > FILE_SIZE_MAX:
        raise ValueError(f"larger than {FILE_SIZE_MAX} bytes: not a file of options")
    return read.decode("utf-8-sig")


def _entries(text: str, path: str) -> list[_Entry]:
    """Raises ValueError with what is wrong with the file as a whole."""
    named_json = path.endswith(".json")
    if named_json or text.lstrip().startswith("{"):
        try:
            return list(_json_entries(text, path))
        except ValueError:
            if named_json:
                raise
    # JSON alone needs no yaml: 20 ms.
    return list(_yaml_entries(text, path))


def _json_entries(text: str, path: str) -> Iterator[_Entry]:
    import json  # 3 ms

    # Numbers stay as written; objects become tuples of pairs, so that a key that stands twice is seen.
    found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=tuple)
    if not isinstance(found, tuple):
        raise ValueError("a JSON object is wanted: option names and their values")  # noqa: TRY004
    for key, value in found:
        yield _Entry(f"{path}: {key}", key, _plain(value, _json_scalar))


def _json_scalar(value: object) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    # A number is text already where it came from a file; an object that others have read holds numbers.
    return str(value) if isinstance(value, str | int) else None


def _yaml_entries(text: str, path: str) -> Iterator[_Entry]:
    import yaml

    # Nodes, not objects: to YAML 1.1 `off` is False, `0x539` is 1337 and `1:20` is 80. As text they mean what was written.
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("a YAML mapping is wanted: option names and their values")  # noqa: TRY004

    def scalar(node: object) -> str | None:
        # A key with nothing behind it is null to YAML: forgotten, most likely, and not a wish for an empty list.
        if not isinstance(node, yaml.ScalarNode) or (node.style is None and node.value in YAML_NULLS):
            return None
        return str(node.value)

    for key_node, node in root.value:
        key = scalar(key_node) or ""
        value = node.value if isinstance(node, yaml.SequenceNode) else node
        yield _Entry(f"{path}:{key_node.start_mark.line + 1}: {key}", key, _plain(value, scalar))


def _plain(value: object, scalar: Callable[[object], str | None]) -> _Value:
    if not isinstance(value, list):
        return scalar(value)
    members = [scalar(member) for member in value]
    texts = [member for member in members if member is not None]
    return texts if len(texts) == len(members) else None


def local_names(root: str = "/") -> Names:
    """Users and groups of the files in `root`/etc. Never NSS: it may ask the network, which has no route yet, and hang."""

    def lookup(file: str) -> Callable[[str], int]:
        return lambda name: _ids(os.path.join(root, "etc", file))[name]

    return Names(uid=lookup("passwd"), gid=lookup("group"))


def _ids(path: str) -> dict[str, int]:
    """Name -> id, of a passwd(5) or group(5) file; its first entry counts, as it does for getpwnam(3)."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = [line.split(":") for line in file]
    except OSError:
        return {}
    return {row[0]: int(row[2]) for row in reversed(rows) if len(row) > 3 and row[2].isascii() and row[2].isdigit()}
