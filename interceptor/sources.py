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

from interceptor.config import FIELD, FIELDS, Config, Field, Names
from interceptor.errors import ConfigError, Problem

ANNOTATION_PREFIX = "interceptor.io/"
ENV_PREFIX = "INTERCEPTOR_"
# What Kubernetes sets in every pod for a Service that is called interceptor or interceptor-… (kubelet/envvars/envvars.go).
# Only the last form could be an option of ours; its value tells: tcp://10.0.0.1:80.
_SERVICE_NAME = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://.*")


@dataclass(frozen=True, slots=True)
class Given:
    """An option's value before it is parsed."""

    text: str
    origin: str  # "environment INTERCEPTOR_PROXY_UID"
    place: str  # the option as the user wrote it, for a Problem


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source gives: option name -> value, and what is wrong with the source itself."""

    values: dict[str, Given] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The Config, and for each option the text of where its value came from: "default", "file /etc/x.yaml", …"""

    config: Config
    origin: dict[str, str]


def resolve(
    *,
    files: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
    names: Names | None = None,
    objects: Sequence[Layer] = (),
) -> Resolved:
    """One Config from all sources; None for `environment` is this process's own, `objects` come after the files.

    Raises one ConfigError with all problems. Values that another source overrides are not judged, nor are contradictions
    between values before each of them is right by itself.
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
    values = _parse(given, names or local_names(), problems)
    if problems:
        raise ConfigError(problems)
    try:
        config = Config(**values)
    except ConfigError as error:
        places = {FIELD[name].flag: value.place for name, value in given.items()}
        located = [replace(problem, option=places.get(problem.option, problem.option)) for problem in error.problems]
        raise ConfigError(located) from None
    return Resolved(config, {row.name: given[row.name].origin if row.name in given else "default" for row in FIELDS})


def _parse(given: Mapping[str, Given], names: Names, problems: list[Problem]) -> dict[str, Any]:
    values = {}
    for name, value in given.items():
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
        if name.startswith(ENV_PREFIX) and not _SERVICE_NAME.fullmatch(name) and not _SERVICE_URL.fullmatch(value)
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
            layer.problems.append(_unknown(name, text, name, known))
    return layer


def _unknown(place: str, value: str, written: str, known: Iterable[str]) -> Problem:
    import difflib  # 2 ms

    close = difflib.get_close_matches(written, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`interceptor config` lists all"
    return Problem(place, value, f"no such option; {hint}")


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
        return Layer(problems=[Problem("--config", path, error.strerror or str(error))])
    except (ValueError, RecursionError) as error:
        return Layer(problems=[Problem("--config", path, " ".join(str(error).split()))])
    return _from_entries(entries, f"file {shown}")


def from_object(found: Mapping[str, object], place: str) -> Layer:
    """From a JSON object that was read already (a conflist's `capture`): keys and values are as in a file."""
    entries = [_Entry(f"{place}.{key}", key, _plain(value, _json_scalar)) for key, value in found.items()]
    return _from_entries(entries, place)


def _from_entries(entries: Iterable[_Entry], origin: str) -> Layer:
    layer = Layer()
    known = [option.name for option in FIELDS]
    for entry in entries:
        name = entry.key.replace("-", "_")
        if name not in FIELD:
            layer.problems.append(_unknown(entry.place, _shown(entry.value), name, known))
        elif name in layer.values:
            layer.problems.append(Problem(entry.place, _shown(entry.value), f"stands at {layer.values[name].place} already"))
        else:
            _add(layer, FIELD[name], entry, origin)
    return layer


def _add(layer: Layer, option: Field, entry: _Entry, origin: str) -> None:
    value = entry.value
    if isinstance(value, list) and option.kind.separator is not None:
        value = option.kind.separator.join(value)
    if isinstance(value, str):
        layer.values[option.name] = Given(value, origin, entry.place)
    else:
        wanted = "one value" if option.kind.separator is None else "one value or a list of them"
        layer.problems.append(Problem(entry.place, _shown(entry.value), f"takes {wanted}; leave the key out for the default"))


def _shown(value: _Value) -> str:
    return ",".join(value) if isinstance(value, list) else value or ""


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    with open(path, encoding="utf-8-sig") as file:
        return file.read()


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
        if not isinstance(node, yaml.ScalarNode) or (node.style is None and node.value in ("~", "null", "Null", "NULL")):
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
