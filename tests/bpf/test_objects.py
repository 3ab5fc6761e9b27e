"""The committed objects are what the committed sources make."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from interceptor.bpf.elf import read_object
from tests.bpf import build


@pytest.mark.parametrize("name", build.names())
def test_object_is_built_from_these_sources(name: str) -> None:
    content = (build.OBJECTS / f"{name}.bpf.o").read_bytes()
    assert build.stamped_hash(content) == build.source_hash(name), "run `make bpf`"


@pytest.mark.parametrize("name", build.names())
def test_object_is_reproducible(name: str) -> None:
    committed = (build.OBJECTS / f"{name}.bpf.o").read_bytes()
    if shutil.which("clang") is None:
        pytest.skip("no clang: the source hash alone was compared")
    if _compiler_of(committed) != _compiler_of(build.compiled(name)):
        pytest.skip(f"another clang than the one that built the object: {_compiler_of(committed)}")
    assert build.compiled(name) == committed


@pytest.mark.parametrize("name", build.names())
def test_every_program_is_in_a_section_we_can_load(name: str) -> None:
    from interceptor.bpf.programs import SECTIONS

    source = read_object((build.OBJECTS / f"{name}.bpf.o").read_bytes())
    assert source.programs
    assert {program.section for program in source.programs.values()} <= set(SECTIONS)


def _compiler_of(content: bytes) -> bytes:
    return next((line for line in content.split(b"\0") if b"clang version" in line), b"")


def test_the_build_needs_no_header_but_the_kernels() -> None:
    included = subprocess.run(["grep", "-rhE", "^#include <", str(build.SOURCES)], capture_output=True, text=True, check=True)
    assert {line.split("/")[0] for line in included.stdout.splitlines()} == {"#include <linux"}
