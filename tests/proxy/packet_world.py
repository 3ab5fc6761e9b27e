"""What the packet relay's tests look at: the proxy's BPF maps from outside, conntrack, and a network that loses packets."""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from interceptor import netns
from interceptor.bpf import links, maps, programs
from interceptor.bpf.elf import ProgramCode
from interceptor.bpf.syscall import bpf
from tests.proxy.pods import DEADLINE_S, run

MAP_GET_FD_BY_ID = 14  # enum bpf_cmd, linux/bpf.h
HELD = ("flows", "paths", "silent", "accepted")


def until(claim: Callable[[], bool], what: Callable[[], object]) -> None:
    """Wait for `claim`; what there is instead when it never comes true."""
    deadline = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def entries(pid: int) -> dict[str, int]:
    """How many entries the flow maps of process `pid` have."""
    numbers: set[int] = set()
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as file:
                found = re.search(r"^map_id:\s+(\d+)", file.read(), re.MULTILINE)
        except FileNotFoundError:
            continue
        if found:
            numbers.add(int(found[1]))
    counts = {}
    for number in numbers:
        descriptor = bpf(MAP_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
        table = maps.opened_map(descriptor)
        if table.definition.name in HELD:
            counts[table.definition.name] = len(list(table.keys()))
        table.close()
    assert set(counts) == set(HELD)
    return counts


def tracked(where: str, port: int) -> list[str]:
    """conntrack's entries about `port` that are not on their way out."""
    listed = run("ip", "netns", "exec", where, "conntrack", "-L").splitlines()
    return [line for line in listed if f"dport={port} " in line and "ESTABLISHED" in line]


# linux/bpf_common.h, linux/bpf.h: opcode, registers, offset, immediate
_CALL, _MOD, _JEQ, _JGT, _MOV, _MOV_REGISTER, _LOAD, _STORE, _EXIT = 0x85, 0x97, 0x15, 0x25, 0xB7, 0xBF, 0x61, 0x62, 0x95
_GET_PRANDOM_U32, _REDIRECT, _CLONE_REDIRECT = 7, 23, 13
_MARK_AT, _IFINDEX_AT = 8, 40  # struct __sk_buff
_INGRESS = 1  # BPF_F_INGRESS
TCX_NEXT, TCX_DROP = -1, 2
BEEN_HERE = 0x0DD

# What is queued at the same device again comes behind all that waits there: that is how it is made late.
_ROUGH = """
    mov_register 6 1
    load 2 6 mark
    jeq 2 been_here > second_time
    call get_prandom_u32
    mod 0 100
    jeq 0 0 > lose
    jgt 0 10 > next
    store 6 mark been_here
    jgt 0 8 > twice
    load 1 6 ifindex
    mov 2 ingress
    call redirect
    exit
lose:
    mov 0 drop
    exit
twice:
    mov_register 1 6
    load 2 6 ifindex
    mov 3 ingress
    call clone_redirect
second_time:
    store 6 mark 0
next:
    mov 0 next
    exit
"""
_OPCODES = {
    "call": _CALL,
    "mod": _MOD,
    "jeq": _JEQ,
    "jgt": _JGT,
    "mov": _MOV,
    "mov_register": _MOV_REGISTER,
    "load": _LOAD,
    "store": _STORE,
    "exit": _EXIT,
}
_NUMBERS = {
    "mark": _MARK_AT,
    "ifindex": _IFINDEX_AT,
    "been_here": BEEN_HERE,
    "get_prandom_u32": _GET_PRANDOM_U32,
    "redirect": _REDIRECT,
    "clone_redirect": _CLONE_REDIRECT,
    "ingress": _INGRESS,
    "drop": TCX_DROP,
    "next": TCX_NEXT,
}


def _assembled(text: str) -> bytes:
    """The eleven forms above as struct bpf_insn."""
    lines = [line.split() for line in text.split("\n") if line]
    places: dict[str, int] = {}
    words = []
    for line in lines:
        if line[0].endswith(":"):
            places[line[0][:-1]] = len(words)
        else:
            words.append(line)
    code = b""
    for at, (name, *given) in enumerate(words):
        jump = places[given[-1]] - at - 1 if ">" in given else 0
        first, second, third, *_ = [*(_NUMBERS.get(each) or _whole(each) for each in given), 0, 0, 0]
        match name:
            case "call":
                fields = (0, 0, first)
            case "mov_register":
                fields = (second << 4 | first, 0, 0)
            case "load":
                fields = (second << 4 | first, third, 0)
            case "store":
                fields = (first, second, third)
            case _:
                fields = (first, jump, second)
        code += struct.pack("<BBhi", _OPCODES[name], *fields)
    return code


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0


@contextmanager
def rough(where: str, device: str) -> Iterator[None]:
    """Of the packets that arrive at `device`, 1 % are lost, 8 % late, 2 % come twice. There is no netem in every kernel.

    They come one by one: what is sent in one piece would be lost, or late, in one piece.
    """
    run("ip", "-n", where, "link", "set", device, "gso_max_segs", "1")
    with netns.entered(f"/run/netns/{where}"):
        program = programs.load_program(ProgramCode("rough", "tcx/ingress", _assembled(_ROUGH), ()), {})
        link = links.attach_interface(program, _index(where, device))
    try:
        yield
    finally:
        link.close()
        program.close()
        run("ip", "-n", where, "link", "set", device, "gso_max_segs", "65535")


def tcp_extended(where: str, group: str = "TcpExt") -> dict[str, int]:
    """The kernel's counters of a group in /proc/net/netstat of `where`."""
    with netns.entered(f"/run/netns/{where}"), open("/proc/thread-self/net/netstat", encoding="ascii") as file:
        names, values = (line.split()[1:] for line in file if line.startswith(f"{group}:"))
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def out_of_order(where: str) -> int:
    """How many segments the TCP of `where` has kept for later because others were missing."""
    return tcp_extended(where)["TCPOFOQueue"]


def _index(where: str, device: str) -> int:
    return int(run("ip", "-n", where, "-o", "link", "show", device).split(":")[0])
