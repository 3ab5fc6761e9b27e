"""Read what clang makes of `src/*.bpf.c`: programs, map definitions, constants and the relocations between them.

Pure: bytes in, values out. Knows ELF64 for BPF (linux/elf.h, docs.kernel.org/bpf/llvm_reloc.html), not the kernel.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from interceptor.bpf.maps import MapDefinition
from interceptor.bpf.syscall import BpfError

SHT_SYMTAB = 2
SHT_NOBITS = 8
SHT_REL = 9
STT_FUNC = 2
R_BPF_64_64 = 1  # a 16-byte ld_imm64: map or data
# Old style, read without BTF: each entry is struct map_def of src/helpers.h, five u32.
MAPS_SECTION = "maps"
MAP_DEFINITION = struct.Struct("=5I")
DATA_SECTIONS = (".rodata", ".data", ".bss")
SYMBOL = struct.Struct("<IBBHQQ")
SECTION = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True, slots=True)
class Relocation:
    """The ld_imm64 at `offset` of a program wants the map `target`, or the address `at` in the data section `target`."""

    offset: int
    target: str
    at: int


@dataclass(frozen=True, slots=True)
class ProgramCode:
    """One function with a section of ours (`tcx/ingress`, `cgroup/connect4`): its instructions before relocation."""

    name: str
    section: str
    code: bytes
    relocations: tuple[Relocation, ...]


@dataclass(frozen=True, slots=True)
class BpfObject:
    """The content of one object file. `variables` are (section, offset, size) by name."""

    programs: dict[str, ProgramCode]
    maps: dict[str, MapDefinition]
    data: dict[str, bytes]
    variables: dict[str, tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    content: bytes
    link: int
    target: int


@dataclass(frozen=True, slots=True)
class _Symbol:
    name: str
    section: str
    kind: int
    value: int
    size: int


def read_object(content: bytes) -> BpfObject:
    """Parse a clang `-target bpf` object. Raises BpfError when it holds what we do not know how to load."""
    if content[:6] != b"\x7fELF\x02\x01":
        raise BpfError("the BPF object is not a little-endian ELF64 file")
    sections = _sections(content)
    symbols = _symbols(sections)
    maps = {
        symbol.name: MapDefinition(symbol.name, *MAP_DEFINITION.unpack_from(_named(sections, MAPS_SECTION), symbol.value))
        for symbol in symbols
        if symbol.section == MAPS_SECTION and symbol.name
    }
    map_at = {symbol.value: symbol.name for symbol in symbols if symbol.section == MAPS_SECTION and symbol.name}
    relocations = _relocations(sections, symbols, map_at)
    return BpfObject(
        programs={
            symbol.name: _program(symbol, _named(sections, symbol.section), relocations.get(symbol.section, []))
            for symbol in symbols
            if symbol.kind == STT_FUNC
        },
        maps=maps,
        data={section.name: section.content for section in sections if section.name in DATA_SECTIONS and section.content},
        variables={
            symbol.name: (symbol.section, symbol.value, symbol.size)
            for symbol in symbols
            if symbol.section in DATA_SECTIONS and symbol.name
        },
    )


def _sections(content: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", content, 40)
    count, names_at = struct.unpack_from("<HH", content, 60)
    headers = [SECTION.unpack_from(content, table + SECTION.size * index) for index in range(count)]
    names = content[headers[names_at][4] :]
    return [
        _Section(
            _text(names, name),
            kind,
            bytes(size) if kind == SHT_NOBITS else content[offset : offset + size],
            link,
            target,
        )
        for name, kind, _flags, _addr, offset, size, link, target, _align, _entry in headers
    ]


def _symbols(sections: list[_Section]) -> list[_Symbol]:
    table = next(section for section in sections if section.kind == SHT_SYMTAB)
    names = sections[table.link].content
    return [
        _Symbol(_text(names, name), sections[index].name if index < len(sections) else "", info & 15, value, size)
        for name, info, _other, index, value, size in SYMBOL.iter_unpack(table.content)
    ]


def _relocations(sections: list[_Section], symbols: list[_Symbol], map_at: dict[int, str]) -> dict[str, list[Relocation]]:
    found: dict[str, list[Relocation]] = {}
    for section in sections:
        # Only of relocations is `target` a section's number.
        if section.kind != SHT_REL or sections[section.target].name.startswith("."):
            continue  # debug sections
        code = sections[section.target]
        for offset, info in struct.iter_unpack("<QQ", section.content):
            symbol = symbols[info >> 32]
            if info & 0xFFFFFFFF != R_BPF_64_64 or symbol.section not in (MAPS_SECTION, *DATA_SECTIONS):
                raise BpfError(f"{code.name}+{offset}: relocation {info & 0xFFFFFFFF} to {symbol.name or symbol.section}")
            # REL keeps the addend in the instruction: an offset from the symbol, which may be the section's own.
            at = symbol.value + int(struct.unpack_from("<i", code.content, offset + 4)[0])
            target = map_at[at] if symbol.section == MAPS_SECTION else symbol.section
            found.setdefault(code.name, []).append(Relocation(offset, target, at))
    return found


def _program(symbol: _Symbol, section: bytes, relocations: list[Relocation]) -> ProgramCode:
    first, past = symbol.value, symbol.value + symbol.size
    own = tuple(Relocation(each.offset - first, each.target, each.at) for each in relocations if first <= each.offset < past)
    return ProgramCode(symbol.name, symbol.section, section[first:past], own)


def _named(sections: list[_Section], name: str) -> bytes:
    return next(section.content for section in sections if section.name == name)


def _text(names: bytes, offset: int) -> str:
    return names[offset : names.index(b"\0", offset)].decode()
