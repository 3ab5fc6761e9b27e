"""Each request of attaching the packet relay's programs is refused once: all are attached, or none is and nothing stays."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from interceptor.bpf.programs import TCX_EGRESS, TCX_INGRESS
from interceptor.bpf.syscall import BpfError
from interceptor.proxy.relay import packet_pins
from interceptor.proxy.relay.packet_attach import Attached, attach
from tests.rig.client import wait_until
from tests.rig.connecting import own_bpffs, programs_at
from tests.rig.net import Pod, ip
from tests.rig.refusing import descriptors, each_refused

RAISED = (BpfError, OSError)


@pytest.fixture
def pins(pod: Pod) -> Iterator[str]:
    """Where flows are kept, in a namespace with a device."""
    ip("link add eth0 type veth peer name eth1\n", pod)
    with own_bpffs() as bpffs:
        yield packet_pins.directory(bpffs)


def held() -> tuple[int, int]:
    """Programs that see packets here, and descriptors of this process."""
    programs = sum(programs_at(index, kind) for index in interfaces() for kind in (TCX_INGRESS, TCX_EGRESS))
    return programs, descriptors()


def interfaces() -> list[int]:
    return [index for index, _ in socket.if_nameindex()]


@pytest.mark.parametrize(
    "is_pinned", [pytest.param(False, id="unpinned", marks=pytest.mark.torture), pytest.param(True, id="pinned")]
)
def test_attaching(is_pinned: bool, pins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Attached] = []
    before = held()
    for number, why in each_refused(lambda: made.append(attach(2, pins if is_pinned else None)), monkeypatch, RAISED):
        if why:
            assert made == []
        else:
            assert held()[0] == 5, f"call {number}: lo's program, and two of each device's"
            made.pop().give_up()
        wait_until(lambda: held() == before, f"as before call {number}: {why}")  # the kernel detaches soon after a close
        assert not os.path.exists(pins) or os.listdir(pins) == [], f"call {number}: {why}"
        os.makedirs(pins, exist_ok=True)


@pytest.mark.torture
def test_taking_over(pins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(2, pins).close()
    before, kept = (5, descriptors()), sorted(os.listdir(pins))
    made: list[Attached] = []
    for number, why in each_refused(lambda: made.append(attach(2, pins)), monkeypatch, RAISED):
        assert (made == []) == bool(why)
        while made:
            made.pop().give_up()
        wait_until(lambda: held() == before, f"as before call {number}: {why}")
        assert sorted(os.listdir(pins)) == kept, f"call {number}: {why}"
    packet_pins.discard(pins)
