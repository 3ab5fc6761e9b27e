"""BPF maps: create, look up, update, delete, walk. Keys and values are bytes; what they mean is their owner's business."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from interceptor.bpf.syscall import (
    MAP_CREATE,
    MAP_DELETE_BATCH,
    MAP_DELETE_ELEM,
    MAP_FREEZE,
    MAP_GET_NEXT_KEY,
    MAP_LOOKUP_ELEM,
    MAP_UPDATE_ELEM,
    BpfError,
    Buffer,
    bpf,
    checked,
    object_info,
    raw_bpf,
)

# enum bpf_map_type, linux/bpf.h
HASH = 1
ARRAY = 2
PERCPU_ARRAY = 6
LRU_HASH = 9
ARRAY_OF_MAPS = 12
RINGBUF = 27
# Flags of MAP_UPDATE_ELEM
ANY = 0  # create or replace
NOEXIST = 1
EXIST = 2
NAME_SIZE = 15  # BPF_OBJ_NAME_LEN without its NUL


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """What the kernel is asked for. Sizes in bytes; `flags` are BPF_F_* of MAP_CREATE."""

    name: str
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0


class Map:
    """One map, by its descriptor. Each call reuses the same three buffers: not for several threads."""

    __slots__ = ("_attr", "_attr_of_key", "_call", "_key", "_next", "_value", "definition", "descriptor")

    def __init__(self, descriptor: int, definition: MapDefinition) -> None:
        self.descriptor = descriptor
        self.definition = definition
        self._call = raw_bpf()
        self._key = Buffer(definition.key_size)
        self._value = Buffer(_value_span(definition))
        self._next = Buffer(definition.key_size)
        # struct { map_fd, key, value or next_key, flags }: the anonymous struct of BPF_MAP_*_ELEM
        self._attr = Buffer(self._attr_to(self._value))
        # The kernel refuses an attr with anything behind the last field a command knows.
        self._attr_of_key = Buffer(struct.pack("=IIQQQ", descriptor, 0, self._key.address, 0, 0))

    def __repr__(self) -> str:
        return f"<Map {self.definition.name} fd {self.descriptor}>"

    def lookup(self, key: bytes) -> bytes | None:
        """The value at `key`; None when there is none. Raises OSError for all else."""
        self._key.content = key
        result = self._call(MAP_LOOKUP_ELEM, self._attr.address, 32)
        if result == -errno.ENOENT:
            return None
        checked(result)
        return self._value.content

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Put `value` at `key`. Raises OSError: E2BIG when the map is full, EEXIST or ENOENT as `flags` ask."""
        self._key.content = key
        self._value.content = value
        if flags != ANY:
            attr = struct.pack("=IIQQQ", self.descriptor, 0, self._key.address, self._value.address, flags)
            bpf(MAP_UPDATE_ELEM, attr)
            return
        checked(self._call(MAP_UPDATE_ELEM, self._attr.address, 32))

    def delete(self, key: bytes) -> bool:
        """Remove `key`; whether it was there. Raises OSError for all else."""
        self._key.content = key
        result = self._call(MAP_DELETE_ELEM, self._attr_of_key.address, 32)
        if result == -errno.ENOENT:
            return False
        checked(result)
        return True

    def delete_all(self, keys: Sequence[bytes]) -> None:
        """Remove these keys, those that are there, with few system calls. Raises OSError."""
        content = Buffer(b"".join(keys))
        size, total, done = self.definition.key_size, len(keys), 0
        while done < total:
            # struct batch: in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags
            place = content.address + done * size
            attr = Buffer(struct.pack("=QQQQIIQQ", 0, 0, place, 0, total - done, self.descriptor, 0, 0))
            result = self._call(MAP_DELETE_BATCH, attr.address, attr.size)
            (deleted,) = struct.unpack_from("=I", attr.content, 32)
            done += deleted
            if result == -errno.ENOENT:
                done += 1  # it stops at one that is not there
            else:
                checked(result)

    def keys(self) -> Iterator[bytes]:
        """All keys, more or less: entries that come and go meanwhile may be missed or seen twice (bpf(2))."""
        attr = Buffer(self._attr_to(self._next))
        first = Buffer(struct.pack("=IIQQQ", self.descriptor, 0, 0, self._next.address, 0))
        result = self._call(MAP_GET_NEXT_KEY, first.address, 32)
        while result != -errno.ENOENT:
            checked(result)
            key = self._next.content
            yield key
            self._key.content = key
            result = self._call(MAP_GET_NEXT_KEY, attr.address, 32)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries, with the caveat of `keys`; one that is gone when its turn comes is left out."""
        for key in list(self.keys()):
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def freeze(self) -> None:
        """No more writes from user space: the verifier then reads .rodata as constants."""
        bpf(MAP_FREEZE, struct.pack("=I", self.descriptor))

    def close(self) -> None:
        """Let go of the descriptor; the map lives as long as a program, a pin or another descriptor holds it."""
        os.close(self.descriptor)

    def _attr_to(self, target: Buffer) -> bytes:
        return struct.pack("=IIQQQ", self.descriptor, 0, self._key.address, target.address, 0)


def create_map(definition: MapDefinition, inner: Map | None = None) -> Map:
    """A new map; `inner` is an example of what a map of maps will hold. Raises BpfError naming it; needs CAP_BPF."""
    name = definition.name.encode()[:NAME_SIZE]
    attr = struct.pack(
        "=IIIIIII16s",
        definition.kind,
        definition.key_size,
        definition.value_size,
        definition.max_entries,
        definition.flags,
        0 if inner is None else inner.descriptor,
        0,
        name,
    )
    try:
        return Map(bpf(MAP_CREATE, attr), definition)
    except OSError as error:
        raise BpfError(f"creating BPF map {definition.name}: {error.strerror}; needs CAP_BPF") from error


def opened_map(descriptor: int) -> Map:
    """The map behind `descriptor`, which it owns from now on. Raises OSError; then the descriptor is closed."""
    try:
        return Map(descriptor, describe(descriptor))
    except BaseException:
        os.close(descriptor)
        raise


def describe(descriptor: int) -> MapDefinition:
    """The definition of the map behind `descriptor`, as the kernel has it: for a map that was opened by its pin."""
    # struct bpf_map_info: type, id, key_size, value_size, max_entries, map_flags, name[16]
    kind, _id, key_size, value_size, max_entries, flags, name = struct.unpack_from("=6I16s", object_info(descriptor))
    return MapDefinition(name.partition(b"\0")[0].decode(), kind, key_size, value_size, max_entries, flags)


def _value_span(definition: MapDefinition) -> int:
    """How many bytes a lookup writes: a per-CPU map gives one value, rounded up to eight bytes, for each possible CPU."""
    if definition.kind != PERCPU_ARRAY:
        return definition.value_size
    return possible_cpus() * ((definition.value_size + 7) & ~7)


def possible_cpus() -> int:
    """How many CPUs the kernel counts per-CPU values for (`0-3` or `0` in sysfs; it starts at 0 on every machine)."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        return int(file.read().strip().rpartition("-")[2].rpartition(",")[2]) + 1
