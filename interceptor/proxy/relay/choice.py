"""Which relay moves the bytes, and why. Tried in order of what they cost; the choice says its reason."""

from __future__ import annotations

from typing import NamedTuple, get_args

from interceptor.bpf.syscall import BpfError
from interceptor.errors import ProxyError
from interceptor.proxy.loop import Loop
from interceptor.proxy.relay import packet_attach, packet_pins, packet_selftest
from interceptor.proxy.relay.base import Relay
from interceptor.proxy.relay.copy import CopyRelay
from interceptor.proxy.relay.packet import PacketRelay
from interceptor.proxy.relay.packet_attach import Attached
from interceptor.proxy.relay.packet_table import FlowTable
from interceptor.proxy.relay.splice import SpliceRelay
from interceptor.proxy.settings import RelayName

NEEDS = "packet splice needs Linux 6.6, CAP_BPF and CAP_NET_ADMIN"
RELAY_NAMES: tuple[RelayName, ...] = get_args(RelayName)


class Choice(NamedTuple):
    """A relay's name, and the reason for it."""

    name: RelayName
    reason: str
    attached: Attached | None = None  # packet's programs, for `serve`


def choose(wanted: RelayName, workers: int, pins: str | None = None) -> Choice:
    """The relay for `--relay`, in the current network namespace. Call it before privileges are dropped.

    pins: where packet's flows are left to the next proxy, and found.
    Raises ProxyError when `wanted` is packet and it does not work here.
    """
    if wanted not in ("auto", "packet"):
        return Choice(wanted, "--relay")
    try:
        attached = packet_attach.attach(workers, None if pins is None else packet_pins.directory(pins))
    except (BpfError, OSError) as error:
        # Before tcx, what fails first is something else: on Linux 5.10 a map, since RLIMIT_MEMLOCK counts it.
        problem: str | None = f"{str(error).splitlines()[0]} ({NEEDS})"
    else:
        problem = packet_selftest.problem(attached)
        if problem is None:
            return Choice("packet", "its self-test passed" if wanted == "auto" else "--relay", attached)
        attached.give_up()
    if wanted == "packet":
        raise ProxyError(f"--relay packet: {problem}")
    return Choice("splice", f"packet splice does not work here: {problem}")


def open_relay(name: RelayName, loop: Loop, flow_table: FlowTable | None) -> Relay:
    """The relay called `name`, on `loop`; `flow_table` for packet, which auto takes when there is one."""
    if name == "copy":
        return CopyRelay(loop)
    splice = SpliceRelay(loop)
    return splice if flow_table is None or name == "splice" else PacketRelay(loop, flow_table, splice)
