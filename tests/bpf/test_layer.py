"""The kernel takes what the bpf layer hands it: maps, programs, links and pins."""

from __future__ import annotations

import socket
import struct
import subprocess
from pathlib import Path

import pytest

from interceptor.bpf import links, maps, programs
from interceptor.bpf.elf import ProgramCode
from interceptor.bpf.maps import ARRAY, HASH, PERCPU_ARRAY, MapDefinition
from interceptor.bpf.syscall import BpfError
from tests.rig.net import Pod

MOV_R0, EXIT = 0xB7, 0x95  # linux/bpf_common.h: BPF_ALU64 | BPF_MOV | BPF_K; BPF_JMP | BPF_EXIT
TCX_PASS, TCX_DROP = 0, 2  # linux/bpf.h


def answering(verdict: int) -> programs.Program:
    code = struct.pack("<BBhiBBhi", MOV_R0, 0, 0, verdict, EXIT, 0, 0, 0)
    return programs.load_program(ProgramCode("answering", "tcx/ingress", code, ()), {})


def lo_passes() -> bool:
    """Whether a datagram passes lo: it is delivered, or dropped, before sendto returns."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.sendto(b"?", sock.getsockname())
        sock.settimeout(0.3)
        try:
            return sock.recv(1) == b"?"
        except TimeoutError:
            return False


def test_hash_map_keeps_finds_walks_and_deletes() -> None:
    table = maps.create_map(MapDefinition("table", HASH, 4, 8, 16))
    for number in range(5):
        table.update(struct.pack("=I", number), struct.pack("=Q", number * number))
    assert table.lookup(struct.pack("=I", 3)) == struct.pack("=Q", 9)
    assert table.lookup(struct.pack("=I", 7)) is None
    assert sorted(struct.unpack("=IQ", key + value)[1] for key, value in table.items()) == [0, 1, 4, 9, 16]
    assert table.delete(struct.pack("=I", 3))
    assert not table.delete(struct.pack("=I", 3))
    assert maps.describe(table.descriptor) == table.definition
    table.close()


def test_many_are_deleted_at_once_whether_all_are_there_or_not() -> None:
    table = maps.create_map(MapDefinition("table", HASH, 4, 4, 16))
    for number in range(8):
        table.update(struct.pack("=I", number), bytes(4))
    table.delete_all([])
    table.delete_all([struct.pack("=I", number) for number in (99, 0, 1, 98, 97, 6, 7, 96)])
    assert sorted(struct.unpack("=I", key)[0] for key, _ in table.items()) == [2, 3, 4, 5]
    table.close()


def test_noexist_refuses_to_replace() -> None:
    table = maps.create_map(MapDefinition("table", HASH, 4, 4, 1))
    table.update(bytes(4), b"1234", maps.NOEXIST)
    with pytest.raises(FileExistsError):
        table.update(bytes(4), b"5678", maps.NOEXIST)
    assert table.lookup(bytes(4)) == b"1234"
    table.close()


def test_full_map_says_so() -> None:
    table = maps.create_map(MapDefinition("table", HASH, 4, 4, 1))
    table.update(b"aaaa", b"1234")
    with pytest.raises(OSError, match="E2BIG|too long"):
        table.update(b"bbbb", b"1234")
    table.close()


def test_per_cpu_lookup_gives_every_cpus_value() -> None:
    table = maps.create_map(MapDefinition("counts", PERCPU_ARRAY, 4, 8, 1))
    assert table.lookup(bytes(4)) == bytes(8 * maps.possible_cpus())
    table.close()


def test_map_that_cannot_be_is_named() -> None:
    with pytest.raises(BpfError, match="creating BPF map nothing"):
        maps.create_map(MapDefinition("nothing", ARRAY, 4, 0, 1))


def test_refused_program_shows_the_verifiers_log() -> None:
    code = ProgramCode("endless", "tcx/ingress", struct.pack("<BBhi", EXIT, 0, 0, 0), ())
    with pytest.raises(BpfError, match=r"(?s)endless.*R0 !read_ok"):
        programs.load_program(code, {})


def test_program_decides_over_packets_until_its_link_is_closed(pod: Pod) -> None:
    link = links.attach_interface(answering(TCX_DROP), 1)
    assert not lo_passes()
    link.replace(answering(TCX_PASS))
    assert lo_passes()
    link.replace(answering(TCX_DROP))
    link.close()
    assert lo_passes()


def test_pinned_link_outlives_its_descriptor(pod: Pod, tmp_path: Path) -> None:
    directory = str(tmp_path / "bpf")
    links.mount_bpffs(directory)
    try:
        assert links.is_bpffs(directory)
        link = links.attach_interface(answering(TCX_DROP), 1)
        links.pin(link.descriptor, f"{directory}/drop")
        link.close()
        assert not lo_passes()
        adopted = links.open_pinned_link(f"{directory}/drop")
        assert links.unpin(f"{directory}/drop")
        assert not links.unpin(f"{directory}/drop")
        assert not lo_passes()
        adopted.close()
        assert lo_passes()
    finally:
        subprocess.run(["umount", directory], check=True)


def test_pin_outside_a_bpffs_is_refused(tmp_path: Path) -> None:
    assert not links.is_bpffs(str(tmp_path))
    with pytest.raises(BpfError, match="a bpffs"):
        links.pin(maps.create_map(MapDefinition("table", ARRAY, 4, 4, 1)).descriptor, f"{tmp_path}/table")


def test_interface_that_is_not_there_is_named(pod: Pod) -> None:
    with pytest.raises(BpfError, match="interface 77"):
        links.attach_interface(answering(TCX_PASS), 77)
