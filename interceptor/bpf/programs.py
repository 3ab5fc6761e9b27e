"""Load an object's maps and programs into the kernel. Knows section names and program types; what a program does is its C's.

A program the verifier refuses raises BpfError with the end of the verifier's log.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from importlib import resources

from interceptor.bpf.elf import BpfObject, ProgramCode, read_object
from interceptor.bpf.maps import ARRAY, Map, MapDefinition, create_map
from interceptor.bpf.syscall import PROG_LOAD, PROG_TEST_RUN, BpfError, Buffer, bpf, c_string, checked, raw_bpf

# enum bpf_attach_type, linux/bpf.h
CGROUP_INET_INGRESS = 0
CGROUP_INET_EGRESS = 1
CGROUP_INET_SOCK_CREATE = 2
CGROUP_SOCK_OPS = 3
CGROUP_INET4_CONNECT = 10
CGROUP_INET6_CONNECT = 11
CGROUP_UDP4_SENDMSG = 14
CGROUP_UDP6_SENDMSG = 15
CGROUP_UDP4_RECVMSG = 19
CGROUP_UDP6_RECVMSG = 20
CGROUP_GETSOCKOPT = 21
CGROUP_SETSOCKOPT = 22
CGROUP_INET4_GETPEERNAME = 29
CGROUP_INET6_GETPEERNAME = 30
CGROUP_INET4_GETSOCKNAME = 31
CGROUP_INET6_GETSOCKNAME = 32
CGROUP_INET_SOCK_RELEASE = 34
TCX_INGRESS = 46
TCX_EGRESS = 47
# enum bpf_prog_type
_CGROUP_SKB, _SCHED_CLS, _CGROUP_SOCK, _SOCK_OPS, _CGROUP_SOCK_ADDR, _CGROUP_SOCKOPT = 8, 3, 9, 13, 18, 25
# Section name in C -> (program type, expected attach type)
SECTIONS = {
    "tcx/ingress": (_SCHED_CLS, TCX_INGRESS),
    "tcx/egress": (_SCHED_CLS, TCX_EGRESS),
    "sockops": (_SOCK_OPS, CGROUP_SOCK_OPS),
    "cgroup/skb_ingress": (_CGROUP_SKB, CGROUP_INET_INGRESS),
    "cgroup/skb_egress": (_CGROUP_SKB, CGROUP_INET_EGRESS),
    "cgroup/sock_create": (_CGROUP_SOCK, CGROUP_INET_SOCK_CREATE),
    "cgroup/sock_release": (_CGROUP_SOCK, CGROUP_INET_SOCK_RELEASE),
    "cgroup/connect4": (_CGROUP_SOCK_ADDR, CGROUP_INET4_CONNECT),
    "cgroup/connect6": (_CGROUP_SOCK_ADDR, CGROUP_INET6_CONNECT),
    "cgroup/sendmsg4": (_CGROUP_SOCK_ADDR, CGROUP_UDP4_SENDMSG),
    "cgroup/sendmsg6": (_CGROUP_SOCK_ADDR, CGROUP_UDP6_SENDMSG),
    "cgroup/recvmsg4": (_CGROUP_SOCK_ADDR, CGROUP_UDP4_RECVMSG),
    "cgroup/recvmsg6": (_CGROUP_SOCK_ADDR, CGROUP_UDP6_RECVMSG),
    "cgroup/getpeername4": (_CGROUP_SOCK_ADDR, CGROUP_INET4_GETPEERNAME),
    "cgroup/getpeername6": (_CGROUP_SOCK_ADDR, CGROUP_INET6_GETPEERNAME),
    "cgroup/getsockname4": (_CGROUP_SOCK_ADDR, CGROUP_INET4_GETSOCKNAME),
    "cgroup/getsockname6": (_CGROUP_SOCK_ADDR, CGROUP_INET6_GETSOCKNAME),
    "cgroup/getsockopt": (_CGROUP_SOCKOPT, CGROUP_GETSOCKOPT),
    "cgroup/setsockopt": (_CGROUP_SOCKOPT, CGROUP_SETSOCKOPT),
}
PSEUDO_MAP_FD = 1  # BPF_PSEUDO_MAP_FD: the immediate is a map's descriptor
PSEUDO_MAP_VALUE = 2  # BPF_PSEUDO_MAP_VALUE: an address inside the first value of a map
F_RDONLY_PROG = 1 << 7  # BPF_F_RDONLY_PROG
LOG_SIZE = 4 << 20
LOG_SHOWN = 4000
ATTR_SIZE = 128  # up to and past expected_attach_type; the rest is zero
# The verifier is interrupted by signals and says EAGAIN; libbpf tries five times as well.
TEST_CHECKSUM_COMPLETE = 1 << 2  # BPF_F_TEST_SKB_CHECKSUM_COMPLETE, linux/bpf.h
LOAD_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Program:
    """One loaded program. `attach_type` is where a link may put it."""

    name: str
    descriptor: int
    attach_type: int

    def close(self) -> None:
        """Let go of the descriptor; a link or a pin keeps the program."""
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one object file became."""

    maps: dict[str, Map]
    programs: dict[str, Program]

    def close(self) -> None:
        """Let go of all descriptors."""
        self.close_but({})

    def close_but(self, kept: Container[str]) -> None:
        """Let go of all descriptors but those of the maps named so, which somebody else holds."""
        for program in self.programs.values():
            program.close()
        for name, each in self.maps.items():
            if name not in kept:
                each.close()


def bundled(name: str) -> BpfObject:
    """The object `interceptor/bpf/objects/<name>.bpf.o` of this package; `make bpf` builds it from `src/`."""
    return read_object(resources.files("interceptor.bpf").joinpath("objects", f"{name}.bpf.o").read_bytes())


def load(
    source: BpfObject,
    constants: Mapping[str, bytes] | None = None,
    reuse: Mapping[str, Map] | None = None,
    max_entries: Mapping[str, int] | None = None,
) -> Loaded:
    """Create the maps of `source` and load its programs.

    constants: `const volatile` variables by name, packed as their C type; the verifier sees them as constants.
    reuse: maps that exist already (opened by their pins) by name, instead of new ones.
    max_entries: sizes other than the C says, by map name.
    Raises BpfError: without CAP_BPF or CAP_NET_ADMIN, or with the verifier's log.
    """
    sizes = max_entries or {}
    maps = dict(reuse or {})
    programs: dict[str, Program] = {}
    try:
        for name, definition in source.maps.items():
            if name not in maps:
                maps[name] = create_map(replace(definition, max_entries=sizes.get(name, definition.max_entries)))
        for section in source.data:
            maps[section] = _data_map(source, section, constants or {})
        for code in source.programs.values():
            programs[code.name] = load_program(code, maps)
    except BaseException:
        Loaded(maps, programs).close_but(reuse or {})
        raise
    return Loaded(maps, programs)


def _data_map(source: BpfObject, section: str, constants: Mapping[str, bytes]) -> Map:
    content = bytearray(source.data[section])
    for name, value in constants.items():
        held_in, offset, size = source.variables[name]
        if held_in != section:
            continue
        if len(value) != size:
            raise BpfError(f"BPF constant {name}: {len(value)} bytes for a variable of {size}")
        content[offset : offset + size] = value
    is_constant = section == ".rodata"
    data = create_map(MapDefinition(section.strip("."), ARRAY, 4, len(content), 1, F_RDONLY_PROG if is_constant else 0))
    try:
        data.update(bytes(4), bytes(content))
        if is_constant:
            data.freeze()
    except BaseException:
        data.close()
        raise
    return data


def load_program(code: ProgramCode, maps: Mapping[str, Map]) -> Program:
    """Load one program with its relocations resolved to `maps`. Raises BpfError with the verifier's log."""
    if code.section not in SECTIONS:
        raise BpfError(f"BPF program {code.name}: section {code.section!r} is none of {', '.join(SECTIONS)}")
    kind, attach_type = SECTIONS[code.section]
    instructions = Buffer(_relocated(code, maps))
    license_text = c_string("GPL")  # several helpers we call are for GPL programs only
    # First without a log: writing one makes loading several times slower.
    # A program for tcx may be attached at both sides, and called from both, as long as it does not say which it expects.
    expected = 0 if kind == _SCHED_CLS else attach_type
    try:
        return Program(code.name, _prog_load(code.name, kind, expected, instructions, license_text), attach_type)
    except OSError as error:
        log = Buffer(LOG_SIZE)
        try:
            return Program(code.name, _prog_load(code.name, kind, expected, instructions, license_text, log), attach_type)
        except OSError:
            said = log.text[-LOG_SHOWN:].strip() or "needs CAP_BPF and, for network programs, CAP_NET_ADMIN"
            raise BpfError(f"loading BPF program {code.name}: {error.strerror}: {said}") from error


def _relocated(code: ProgramCode, maps: Mapping[str, Map]) -> bytes:
    patched = bytearray(code.code)
    for relocation in code.relocations:
        target = maps[relocation.target]
        is_data = relocation.target.startswith(".")
        pseudo = PSEUDO_MAP_VALUE if is_data else PSEUDO_MAP_FD
        # struct bpf_insn: opcode, dst:4 src:4, off, imm; a 64-bit load is two of them, the second's imm the upper half.
        patched[relocation.offset + 1] = patched[relocation.offset + 1] & 0x0F | pseudo << 4
        struct.pack_into("=i", patched, relocation.offset + 4, target.descriptor)
        struct.pack_into("=i", patched, relocation.offset + 12, relocation.at if is_data else 0)
    return bytes(patched)


def _prog_load(
    name: str, kind: int, expected: int, instructions: Buffer, license_text: Buffer, log: Buffer | None = None
) -> int:
    attr = struct.pack(
        "=IIQQIIQII16sII",
        kind,
        instructions.size // 8,
        instructions.address,
        license_text.address,
        1 if log else 0,
        log.size if log else 0,
        log.address if log else 0,
        0,
        0,
        name.encode()[:15],
        0,
        expected,
    ).ljust(ATTR_SIZE, b"\0")
    for _ in range(LOAD_ATTEMPTS - 1):
        try:
            return bpf(PROG_LOAD, attr)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
    return bpf(PROG_LOAD, attr)


def test_run(program: Program, packet: bytes, flags: int = 0) -> tuple[int, bytes]:
    """Run a tcx program over `packet` without a network (BPF_PROG_TEST_RUN): its verdict and the packet as it left it.

    flags: TEST_CHECKSUM_COMPLETE (Linux 6.13) raises OSError with EBADMSG when the sum that a device made of the whole packet
    is not that of the packet any more.
    """
    given, got = Buffer(packet), Buffer(len(packet) + 256)
    # struct: prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration, the context's four, flags
    buffers = (given.size, got.size, given.address, got.address)
    attr = Buffer(struct.pack("=IIIIQQII24xI", program.descriptor, 0, *buffers, 1, 0, flags).ljust(80, b"\0"))
    checked(raw_bpf()(PROG_TEST_RUN, attr.address, attr.size))
    verdict, _, size = struct.unpack_from("=III", attr.content, 4)
    return verdict, got.content[:size]
