"""The static file's stand-ins (cni/static/library) beside the originals: they say the same of every class of ours."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

# By which the file is built: what it is compared with is that library.
PYTHON = "/usr/bin/python3.11"
TREE = Path(__file__).parents[2]
LIBRARY = TREE / "cni/static/library"
STAND_INS = sorted(path.stem for path in LIBRARY.glob("*.py"))
# What build.py freezes beside them: the originals by another name, the patterns.
MAKE = f"""
import json, sys
from pathlib import Path
sys.path[:0] = [{str(TREE / "cni/static")!r}]
import build
files = build.modules()
folder = Path(sys.argv[1])
(folder / "modules.json").write_text(json.dumps(dict(zip(files, map(str, files.values())))))
(folder / "compiled_patterns.py").write_text(build.patterns_module(files))
for name in build.FALLBACKS:
    path = files["original_" + name]
    is_package = path.name == "__init__.py"
    (folder / ("original_" + name + ("" if is_package else ".py"))).symlink_to(path.parent if is_package else path)
"""
# What the plugin can come to import, as far as it holds dataclasses.
MODULES = (
    "cni.plugin",
    "cni.annotations.istio",
    "cni.annotations.kuma",
    "cni.annotations.linkerd",
    "interceptor.backends.iptables",
)
# Every dataclass's shape, and what becomes of its instances: made by position and by name, compared, hashed, changed, shown.
SURVEY = """
import copy, dataclasses, importlib, json, sys

def tried(work):
    try:
        return repr(work())
    except Exception as error:
        return type(error).__name__

class Value:
    def __init__(self, name): self.name = name
    def __repr__(self): return self.name
    def __eq__(self, other): return self.name == other.name
    def __lt__(self, other): return self.name < other.name
    def __hash__(self): return hash(self.name)

def survey(cls):
    fields = dataclasses.fields(cls)
    plain = [each for each in fields if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING]
    named = {each.name: Value(each.name) for each in plain}
    by_position = [] if any(each.kw_only for each in plain) else [Value(each.name) for each in plain]
    one, other = cls(**named), cls(*by_position) if by_position else cls(**named)
    first = fields[0].name if fields else "none"
    return {
        "fields": [
            (each.name, "" if each.default is dataclasses.MISSING else repr(each.default), each.kw_only, each.compare)
            for each in fields
        ],
        "metadata": [sorted(each.metadata) for each in fields],
        "match": cls.__match_args__, "slots": tried(lambda: cls.__slots__),
        "doc": "" if cls.__doc__ is None or "(" in cls.__doc__ else cls.__doc__,
        "shown": tried(lambda: one), "equal": one == other, "unlike": one == 1,
        "hash": tried(lambda: hash(one) == hash(other)), "replaced": tried(lambda: dataclasses.replace(one)),
        "changed": tried(lambda: dataclasses.replace(one, **{first: Value("changed")})),
        "less": tried(lambda: one < other), "least": tried(lambda: one <= other), "more": tried(lambda: one > other),
        # Of a class with slots and no such name, the original answers with a TypeError of its own.
        "set": fields and tried(lambda: setattr(copy.copy(one), first, None)),
        "deleted": fields and tried(lambda: delattr(copy.copy(one), first)),
        "unknown": tried(lambda: cls(**named, no_such_field=1)), "twice": tried(lambda: cls(*by_position, **named)),
        "too_many": tried(lambda: cls(*range(99))), "too_few": tried(cls),
    }

for name in sys.argv[1:]:
    importlib.import_module(name)
found = {}
for module in list(sys.modules.values()):
    if module.__name__.partition(".")[0] in ("cni", "interceptor"):
        for cls in vars(module).values():
            if isinstance(cls, type) and hasattr(cls, "__dataclass_fields__"):
                found[f"{cls.__module__}.{cls.__qualname__}"] = survey(cls)
print(json.dumps(found))
"""


# Of every Enum: its members, what they are found by, and what is refused.
ENUMS = """
import copy, enum, importlib, json, sys

def tried(work):
    try:
        return repr(work())
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def survey(cls):
    first = next(iter(cls))
    return {
        "members": [[one.name, repr(one.value), repr(one), str(one), f"{one}", one == first, one is first] for one in cls],
        "by_name": list(cls.__members__), "count": len(cls), "hash": hash(first) == hash(cls(first.value)),
        "same": cls(first.value) is cls[first.name] is getattr(cls, first.name) is cls(first) is copy.deepcopy(first),
        "in": first in cls, "no_value": tried(lambda: cls("nothing")), "unhashable": tried(lambda: cls([])),
        "no_name": tried(lambda: cls["NOTHING"]), "set": tried(lambda: setattr(cls, first.name, 1)),
        "less": tried(lambda: first < first).partition(":")[0], "sorted": tried(lambda: sorted([first])),
        "instance": isinstance(first, cls), "int": isinstance(first, int), "value": tried(lambda: first == first.value),
    }

class Number(enum.IntEnum):
    ONE = 1
    TWO = 2
    UNO = 1

for name in sys.argv[1:]:
    importlib.import_module(name)
found = {"Number": survey(Number)}
for module in list(sys.modules.values()):
    if module.__name__.partition(".")[0] in ("cni", "interceptor"):
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, enum.Enum) and cls is not enum.Enum and cls is not enum.IntEnum:
                found[f"{cls.__module__}.{cls.__qualname__}"] = survey(cls)
print(json.dumps(found))
"""
# What is used of functools and of collections, ipaddress's orderings first.
OTHERS = """
import collections, collections.abc, functools, ipaddress, json, operator

def tried(work):
    try:
        return repr(work())
    except Exception as error:
        return f"{type(error).__name__}: {error}"

texts = "10.0.0.1", "10.0.0.2", "::1", "10.0.0.0/24", "10.0.0.0/25", "::/0"
values = [ipaddress.ip_network(text) if "/" in text else ipaddress.ip_address(text) for text in texts] + [1]
compared = [tried(lambda: way(one, other)) for way in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq)
            for one in values for other in values]

@functools.lru_cache(maxsize=1)
def squared(number):
    "A docstring."
    calls.append(number)
    return number * number

@functools.lru_cache
def plain(number):
    calls.append(number)
    return number

@functools.cache
def kept(number):
    calls.append(number)
    return number

calls = []
results = [squared(2), squared(2), squared(3), squared(2), plain(1), plain(1), kept(5), kept(5), plain.__name__]

class Holder:
    @functools.cached_property
    def once(self):
        calls.append("once")
        return 7

holder = Holder()
results += [holder.once, holder.once, squared.__name__, squared.__doc__, squared.__wrapped__(9), Holder.once.__doc__]

@functools.wraps(squared)
def other(): ...

results += [other.__name__, other.__doc__, functools.reduce(operator.add, [1, 2]), functools.partial(max, 1)(2)]
point = collections.namedtuple("point", "x y")(1, 2)
results += [point, tried(lambda: collections.deque([1], 1))]
results += [tried(lambda: module.nothing).partition(":")[0] for module in (functools, collections)]
print(json.dumps([compared, repr(results), calls, issubclass(dict, collections.abc.Mapping), collections.abc.__name__]))
"""
PATTERNS = """
import json, original_re, re
from compiled_patterns import PATTERNS
print(json.dumps([[repr(one), flags, re.compile(one, flags) == original_re.compile(one, flags)] for one, flags in PATTERNS]))
"""
# Of an ADD in-process: everything it imports on its way.
ON_THE_WAY = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print([name for name in sys.modules if name.startswith("original_")])
"""
ADD = (
    "cni.plugin",
    "cni.deadline",
    "cni.ops",
    "cni.output",
    "cni.pod",
    "interceptor.backends.nft",
    "interceptor.backends.nft_load",
)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories to be searched before the standard library's, as the importer of the static file does."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run([PYTHON, "-BISc", MAKE, str(folder)], check=True)
    return [LIBRARY, folder]


def said(code: str, first: list[Path], *arguments: str) -> str:
    start = f"import sys; sys.path[:0] = {[str(each) for each in (*first, TREE)]!r}\n"
    return subprocess.run([PYTHON, "-BISc", start + code, *arguments], capture_output=True, text=True, check=True).stdout


def surveyed(code: str, first: list[Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.sub(r" at 0x[0-9a-f]+", "", said(code, first, *MODULES)))
    return found


def test_every_dataclass_is_as_with_the_standard_library(stand_ins: list[Path]) -> None:
    found, wanted = surveyed(SURVEY, stand_ins), surveyed(SURVEY, [])

    assert len(wanted) > 50
    assert found == wanted


def test_every_enum_is_as_with_the_standard_library(stand_ins: list[Path]) -> None:
    found, wanted = surveyed(ENUMS, stand_ins), surveyed(ENUMS, [])

    assert len(wanted) > 6
    assert found == wanted


def test_what_else_is_used_is_as_with_the_standard_library(stand_ins: list[Path]) -> None:
    assert said(OTHERS, stand_ins) == said(OTHERS, [])


def test_every_pattern_is_compiled_to_what_the_original_makes_of_it(stand_ins: list[Path]) -> None:
    found = json.loads(said(PATTERNS, stand_ins))

    assert len(found) > 20
    assert [one for one in found if not one[2]] == []


def test_an_add_needs_none_of_the_originals(stand_ins: list[Path]) -> None:
    assert said(ON_THE_WAY, stand_ins, *ADD) == "[]\n"


def test_the_static_file_has_our_modules_in_place_of_the_library_s(stand_ins: list[Path]) -> None:
    files = json.loads((stand_ins[1] / "modules.json").read_text())

    assert {name: files.get(name) for name in STAND_INS} == {name: str(LIBRARY / f"{name}.py") for name in STAND_INS}
