"""The static file's stand-ins (cni/static/library) beside the originals: they say the same of every class of ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).parents[2]
LIBRARY = TREE / "cni/static/library"
STAND_INS = sorted(path.stem for path in LIBRARY.glob("*.py"))
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


def surveyed(*first: Path) -> dict[str, Any]:
    start = f"import sys; sys.path[:0] = {[str(each) for each in (*first, TREE)]!r}\n"
    done = subprocess.run([sys.executable, "-ISc", start + SURVEY, *MODULES], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(re.sub(r" at 0x[0-9a-f]+", "", done.stdout))
    return found


def test_every_dataclass_is_as_with_the_standard_library() -> None:
    found, wanted = surveyed(LIBRARY), surveyed()

    assert len(wanted) > 50
    assert found == wanted


@pytest.mark.parametrize("name", STAND_INS)
def test_the_static_file_has_our_module_in_place_of_the_library_s(name: str) -> None:
    code = f"import importlib.util as u; s = u.spec_from_file_location('build', {str(TREE / 'cni/static/build.py')!r})\n"
    code += f"b = u.module_from_spec(s); s.loader.exec_module(b); print(b.modules()[{name!r}])"
    done = subprocess.run(["/usr/bin/python3.11", "-ISc", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == str(LIBRARY / f"{name}.py")
