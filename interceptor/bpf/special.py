"""Maps that take more than sizes: arrays of maps, whose entries can be swapped under readers, and socket storage.

Knows what the kernel wants to be told at creation; what is in them is their owner's business.
"""

from __future__ import annotations

import os
import struct

from interceptor.bpf.maps import NAME_SIZE, Map, MapDefinition, create_map, opened_map
from interceptor.bpf.syscall import BpfError, Buffer, bpf

# enum bpf_map_type and enum bpf_cmd, linux/bpf.h
LPM_TRIE = 11
ARRAY_OF_MAPS = 12
SK_STORAGE = 24
F_NO_PREALLOC = 1 << 0  # BPF_F_NO_PREALLOC: the kernel insists on it for both LPM_TRIE and SK_STORAGE
MAP_CREATE, MAP_GET_FD_BY_ID, BTF_LOAD = 0, 14, 18
# linux/btf.h
BTF_HEADER = struct.Struct("=HBBIIIII")
BTF_MAGIC = 0xEB9F
BTF_KIND_INT, BTF_KIND_ARRAY = 1, 3


def create_array_of_maps(definition: MapDefinition, like: MapDefinition) -> Map:
    """A map whose values are maps like `like`; no entry is set. Raises BpfError."""
    example = create_map(like)
    try:
        return _create(definition, inner=example.descriptor)
    finally:
        example.close()


def create_socket_storage(definition: MapDefinition) -> Map:
    """A map that keeps a value with each socket, as long as the socket lives. Raises BpfError."""
    types = _load_types(definition.value_size)
    try:
        return _create(definition, types=types)
    finally:
        os.close(types)


def set_inner(outer: Map, index: int, inner: Map) -> None:
    """Make `inner` the map at `index`. When this returns, no program uses the one before it (BPF_MAP_UPDATE_ELEM waits)."""
    outer.update(struct.pack("=I", index), struct.pack("=I", inner.descriptor))


def inner_of(outer: Map, index: int) -> Map | None:
    """The map at `index`; None when there is none. Needs CAP_SYS_ADMIN."""
    found = outer.lookup(struct.pack("=I", index))
    if found is None:
        return None
    return opened_map(bpf(MAP_GET_FD_BY_ID, found.ljust(12, b"\0")))


def _create(definition: MapDefinition, *, inner: int = 0, types: int = 0) -> Map:
    attr = struct.pack(
        "=7I16sIIII",
        definition.kind,
        definition.key_size,
        definition.value_size,
        definition.max_entries,
        definition.flags,
        inner,
        0,
        definition.name.encode()[:NAME_SIZE],
        0,
        types,
        1 if types else 0,
        2 if types else 0,
    )
    try:
        return Map(bpf(MAP_CREATE, attr), definition)
    except OSError as error:
        raise BpfError(f"creating BPF map {definition.name}: {error.strerror}; needs CAP_BPF") from error


def _load_types(value_size: int) -> int:
    """The least BTF that socket storage is created with: type 1, a u32 for the key; type 2, an array of them for the value."""
    strings = b"\0u32\0"
    u32 = struct.pack("=IIII", 1, BTF_KIND_INT << 24, 4, 32)
    array = struct.pack("=IIIIII", 0, BTF_KIND_ARRAY << 24, 0, 1, 1, value_size // 4)
    types = u32 + array
    content = BTF_HEADER.pack(BTF_MAGIC, 1, 0, BTF_HEADER.size, 0, len(types), len(types), len(strings)) + types + strings
    held = Buffer(content)
    try:
        return bpf(BTF_LOAD, struct.pack("=QQIII", held.address, 0, held.size, 0, 0))
    except OSError as error:
        raise BpfError(f"loading BTF: {error.strerror}; needs CAP_BPF") from error
