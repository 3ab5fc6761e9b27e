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
        table = maps.Map(descriptor, maps.describe(descriptor))
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
_CALL, _MOD, _JNE, _MOV, _EXIT = 0x85, 0x97, 0x55, 0xB7, 0x95
GET_PRANDOM_U32 = 7
TCX_NEXT, TCX_DROP = -1, 2


def _dropper(one_in: int) -> programs.Program:
    instructions = (
        (_CALL, 0, 0, GET_PRANDOM_U32),
        (_MOD, 0, 0, one_in),
        (_JNE, 0, 2, 0),
        (_MOV, 0, 0, TCX_DROP),
        (_EXIT, 0, 0, 0),
        (_MOV, 0, 0, TCX_NEXT),
        (_EXIT, 0, 0, 0),
    )
    code = b"".join(struct.pack("<BBhi", *each) for each in instructions)
    return programs.load_program(ProgramCode("dropper", "tcx/ingress", code, ()), {})


@contextmanager
def losing(where: str, device: str, one_in: int) -> Iterator[None]:
    """`device` loses one packet of so many that arrive. There is no netem in every kernel."""
    with netns.entered(f"/run/netns/{where}"):
        program = _dropper(one_in)
        link = links.attach_interface(program, _index(where, device))
    try:
        yield
    finally:
        link.close()
        program.close()


def _index(where: str, device: str) -> int:
    return int(run("ip", "-n", where, "-o", "link", "show", device).split(":")[0])
