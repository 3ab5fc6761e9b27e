"""Which relay moves the bytes, and why. Tried in order of what they cost; the choice says its reason."""

from __future__ import annotations

from typing import NamedTuple, get_args

from interceptor.proxy.loop import Loop
from interceptor.proxy.relay.base import Relay
from interceptor.proxy.relay.copy import CopyRelay
from interceptor.proxy.relay.packet import PacketRelay
from interceptor.proxy.relay.packet_table import FlowTable
from interceptor.proxy.relay.splice import SpliceRelay
from interceptor.proxy.settings import RelayName

RELAY_NAMES: tuple[RelayName, ...] = get_args(RelayName)


class Choice(NamedTuple):
    """A relay's name, and the reason for it."""

    name: str
    reason: str


def choose(wanted: RelayName) -> Choice:
    """The relay for `--relay`."""
    if wanted == "auto":
        return Choice("splice", "needs no privilege, and moves bulk without copying it")
    return Choice(wanted, "--relay")


def open_relay(name: RelayName, loop: Loop, flow_table: FlowTable | None) -> Relay:
    """The relay called `name`, on `loop`; `flow_table` for packet, which auto takes when there is one."""
    if name == "copy":
        return CopyRelay(loop)
    splice = SpliceRelay(loop)
    return splice if flow_table is None or name == "splice" else PacketRelay(loop, flow_table, splice)
