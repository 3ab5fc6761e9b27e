"""Build the plugin as one static file: Debian's libpython, linked with main.c and with the byte code it needs, frozen.

Run by Debian's own Python 3.11 (its byte code must be its library's): /usr/bin/python3.11 cni/static/build.py OUTPUT
The same input gives the same bytes: no date, no path, no order of a directory goes in. Needs gcc, libpython3.11-dev, zlib1g-dev
and libexpat1-dev.
"""

from __future__ import annotations

import marshal
import modulefinder
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import patterns

TREE = Path(__file__).resolve().parent.parent.parent
# In place of the standard library's modules of the same names; some fall back on the original, which is original_NAME then.
LIBRARY = TREE / "cni/static/library"
FALLBACKS = ("collections", "enum", "functools", "re")
VERSION = "3.11"
# The finder can't see these: they are imported by name.
CODECS = ("aliases", "ascii", "latin_1", "utf_8")
# What the finder follows and no code of ours reaches: documentation, other systems, what only a developer runs; and what needs
# ctypes, which cannot be linked statically: capture at connect() (backends/at_connect.py says so).
EXCLUDED = (
    "argparse asyncio bz2 click csv ctypes doctest email encodings.mbcs getopt gettext importlib.metadata "
    "interceptor.backends.connect iptc logging lzma multiprocessing ntpath optparse pdb psutil py_compile pydoc pyroute2 "
    "statistics tarfile tkinter tracemalloc unittest yaml zipfile"
).split()
# What compiles patterns beside our own modules: an in-process request needs it.
WITH_PATTERNS = ("json.decoder", "json.encoder", "json.scanner")
C_FLAGS = ("-Os", "-Wall", "-Wextra", "-Werror", "-ffile-prefix-map=" + str(TREE) + "=.")
# The linker notes that NSS needs shared libraries: nothing here asks for a user or host name.
LINK_FLAGS = ("-static", "-Wl,--build-id=none", "-Wl,--gc-sections", "-s")
# struct _frozen: name, byte code, its size, whether it is a package (Include/cpython/import.h).
MODULES_C = """#include <Python.h>
extern const unsigned char code[];
__asm__(".section .rodata\\n.global code\\ncode: .incbin \\"modules.bin\\"\\n.previous");
const struct _frozen modules[] = {
%s    {NULL, NULL, 0, 0, NULL},
};
"""
LIBRARIES = ("-lexpat", "-lz", "-lm", "-ldl", "-lpthread", "-lutil")


def main(arguments: list[str]) -> int:
    """Build to the path given."""
    if sys.version_info[:2] != (3, 11) or len(arguments) != 1:
        print(f"usage: /usr/bin/python{VERSION} {sys.argv[0]} OUTPUT", file=sys.stderr)
        return 2
    output = Path(arguments[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        freeze(Path(folder))
        program = Path(folder) / "program"
        link(program, Path(folder))
        put(program, output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    return 0


def put(program: Path, output: Path) -> None:
    """Put `program` in the place of `output`, which may be running."""
    made = output.with_name(output.name + ".new")
    made.write_bytes(program.read_bytes())
    made.chmod(0o755)
    os.replace(made, output)


def link(program: Path, frozen: Path) -> None:
    """Compile main.c and what freeze() wrote to the directory `frozen`; link them with the static library of Python."""
    include = sysconfig.get_path("include")
    folder = sysconfig.get_config_var("LIBPL")
    subprocess.run(
        [
            shutil.which("gcc") or "/usr/bin/gcc",
            *C_FLAGS,
            f"-I{include}",
            str(TREE / "cni/static/main.c"),
            "modules.c",
            f"{folder}/libpython{VERSION}.a",
            *LINK_FLAGS,
            *LIBRARIES,
            "-o",
            str(program),
        ],
        check=True,
        cwd=frozen,
    )


def freeze(folder: Path) -> None:
    """Write modules.c, and modules.bin with the byte code of all that cni.main can import, for main.c to find.

    Frozen (Python's word): unmarshalled from where the program was mapped; nothing is looked for and no file is read.
    """
    files = modules()
    found = {name: byte_code(name, path) for name, path in files.items()}
    found["compiled_patterns"] = marshal.dumps(compile(patterns_module(files), "compiled_patterns.py", "exec"))
    code = b""
    rows = []
    for name, packed in sorted(found.items()):
        is_package = name in files and files[name].name == "__init__.py"
        rows.append(f'    {{"{name}", code + {len(code)}, {len(packed)}, {int(is_package)}, NULL}},\n')
        code += packed
    (folder / "modules.bin").write_bytes(code)
    (folder / "modules.c").write_text(MODULES_C % "".join(rows))


def modules() -> dict[str, Path]:
    """Name -> source of each module that cni.main can come to import, which is not built into the library."""
    standard = sysconfig.get_path("stdlib")
    ours = modulefinder.ModuleFinder([str(LIBRARY), str(TREE), standard], excludes=EXCLUDED)
    ours.run_script(str(TREE / "cni/main.py"))
    originals = modulefinder.ModuleFinder([standard], excludes=EXCLUDED)
    for name in FALLBACKS:
        originals.import_hook(name)
    renamed = {
        f"original_{name}" if name.partition(".")[0] in FALLBACKS else name: path for name, path in sources(originals).items()
    }
    codecs = {f"encodings.{name}": Path(standard, "encodings", f"{name}.py") for name in CODECS}
    return renamed | sources(ours) | codecs | {"cni.main": TREE / "cni/main.py"}


def sources(finder: modulefinder.ModuleFinder) -> dict[str, Path]:
    """Name -> source of what it found. Built-in modules have none."""
    # vars(): the finder's own modules, whose attributes its stubs don't name.
    files = {name: vars(module)["__file__"] for name, module in finder.modules.items()}
    return {name: Path(file) for name, file in files.items() if file and file.endswith(".py") and name != "__main__"}


def patterns_module(files: dict[str, Path]) -> str:
    """The source of compiled_patterns, of what these modules give to `re`."""
    sys.path.insert(0, str(TREE))
    ours = [name for name, path in files.items() if path.is_relative_to(TREE) and not path.is_relative_to(LIBRARY)]
    written: str = patterns.module({name: files[name] for name in sorted([*ours, *WITH_PATTERNS])})
    return written


def byte_code(name: str, path: Path) -> bytes:
    """A module's code, marshalled: no date and no path of this machine is in it."""
    shown = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
    # Python's own docstrings and assertions go; ours stay, for a traceback that says something.
    optimize = 0 if path.is_relative_to(TREE) else 2
    return marshal.dumps(compile(path.read_bytes(), shown, "exec", dont_inherit=True, optimize=optimize))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
