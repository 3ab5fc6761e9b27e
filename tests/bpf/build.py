"""Build the BPF objects that the package carries: `python -m tests.bpf.build`, or `make bpf`.

Each object is stamped with a hash of the sources it was built from, so that a machine without clang can still tell a stale one.
"""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BPF = Path(__file__).parents[2] / "interceptor" / "bpf"
SOURCES, OBJECTS = BPF / "src", BPF / "objects"
FLAGS = [
    "-target",
    "bpf",
    "-mcpu=v3",
    "-O2",
    "-g0",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
    "-Wno-unused-const-variable",
    "-Wno-unused-function",
    "-Wno-unused-variable",
]
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
STAMP = re.compile(rb"interceptor-source-sha256:([0-9a-f]{64})")


def names() -> list[str]:
    """What there is to build."""
    return sorted(path.name.removesuffix(".bpf.c") for path in SOURCES.glob("*.bpf.c"))


def files_of(name: str) -> list[Path]:
    """The source of `name` and every header of ours that it includes, by whatever way; sorted."""
    found: set[Path] = set()
    waiting = [SOURCES / f"{name}.bpf.c"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [SOURCES / included for included in INCLUDE.findall(path.read_text())]
    return sorted(found)


def source_hash(name: str) -> str:
    """SHA-256 over the names and contents of all files of `name`."""
    digest = hashlib.sha256()
    for path in files_of(name):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def stamped_hash(content: bytes) -> str | None:
    """The source hash that an object carries."""
    found = STAMP.search(content)
    return found[1].decode() if found else None


def compiled(name: str) -> bytes:
    """Compile `name`. The object holds neither paths nor times: the same clang gives the same bytes anywhere."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "out.o"
        # asm/types.h lies in the machine's own directory, where -target bpf does not look.
        machine = f"/usr/include/{platform.machine()}-linux-gnu"
        stamp = f'-DSOURCE_HASH="interceptor-source-sha256:{source_hash(name)}"'
        arguments = ["clang", *FLAGS, stamp, f"-I{machine}", "-c", f"{name}.bpf.c", "-o", str(target)]
        subprocess.run(arguments, cwd=SOURCES, check=True)
        return target.read_bytes()


def main() -> int:
    """Write all objects."""
    OBJECTS.mkdir(exist_ok=True)
    for name in names():
        content = compiled(name)
        (OBJECTS / f"{name}.bpf.o").write_bytes(content)
        print(f"{name}.bpf.o: {len(content)} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
