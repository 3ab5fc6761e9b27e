"""The life of one TCP flow as a table: an event in, commands out. No sockets, no clock, no bytes.

It sees only edges (accepted, open, end of stream, failure), so any relay can move the bytes: copy, splice, the kernel alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from interceptor.sockets import Address


class Side(Enum):
    """The two sides of a relay."""

    CLIENT = "client"
    UPSTREAM = "upstream"

    @property
    def other(self) -> Side:
        """The opposite side."""
        return Side.UPSTREAM if self is Side.CLIENT else Side.CLIENT


class State(Enum):
    """Where a flow is. *_DONE: that side has sent its FIN, the other still speaks."""

    NEW = "new"
    OPENING = "opening"
    RELAYING = "relaying"
    CLIENT_DONE = "client_done"
    UPSTREAM_DONE = "upstream_done"
    CLOSED = "closed"


class How(Enum):
    """How a side is closed: FIN says all is well, RST says it is not."""

    FIN = "fin"
    RESET = "reset"


class Timer(Enum):
    """What the one timer of a flow waits for. Arming replaces the one before; closing disarms."""

    CONNECT = "connect"
    IDLE = "idle"


class Reason(Enum):
    """Why a flow ended, as reported."""

    CLOSED = "closed"
    CLIENT_FAILED = "client_failed"
    UPSTREAM_FAILED = "upstream_failed"
    CONNECT_FAILED = "connect_failed"
    CONNECT_TIMEOUT = "connect_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A captured connection, and where it was going."""

    client: Address
    original_dst: Address


@dataclass(frozen=True, slots=True)
class UpstreamOpen:
    """The upstream connection is established."""


@dataclass(frozen=True, slots=True)
class UpstreamFailed:
    """The upstream connection cannot be established."""

    errno: int


@dataclass(frozen=True, slots=True)
class Eof:
    """`side` has ended its stream, and everything it sent has been written to the other side."""

    side: Side


@dataclass(frozen=True, slots=True)
class RelayFailed:
    """`side` is broken: reset, timed out."""

    side: Side
    errno: int


@dataclass(frozen=True, slots=True)
class Idle:
    """The armed timer ran out and nothing had happened."""


@dataclass(frozen=True, slots=True)
class Drain:
    """The proxy stops now: the drain deadline has passed."""


@dataclass(frozen=True, slots=True)
class OpenUpstream:
    """Dial `dst`."""

    dst: Address | None = None


@dataclass(frozen=True, slots=True)
class StartRelay:
    """Move bytes both ways until told to stop."""


@dataclass(frozen=True, slots=True)
class ShutdownWrite:
    """Send FIN to `side`; it may still speak."""

    side: Side


@dataclass(frozen=True, slots=True)
class Close:
    """Be done with `side`."""

    side: Side
    how: How


@dataclass(frozen=True, slots=True)
class Arm:
    """Start `timer` in place of the one before."""

    timer: Timer


@dataclass(frozen=True, slots=True)
class Report:
    """The flow is over: record it."""

    reason: Reason
    errno: int | None = None


Event: TypeAlias = Accepted | UpstreamOpen | UpstreamFailed | Eof | RelayFailed | Idle | Drain
Command: TypeAlias = OpenUpstream | StartRelay | ShutdownWrite | Close | Arm | Report
Key: TypeAlias = tuple[State, type[Event], Side | None]


class IllegalEvent(Exception):
    """An event that cannot happen in this state: a bug in whoever sent it."""


def _reset(reason: Reason) -> tuple[State, tuple[Command, ...]]:
    return State.CLOSED, (Close(Side.CLIENT, How.RESET), Close(Side.UPSTREAM, How.RESET), Report(reason))


_FINISHED: tuple[State, tuple[Command, ...]] = (
    State.CLOSED,
    (Close(Side.CLIENT, How.FIN), Close(Side.UPSTREAM, How.FIN), Report(Reason.CLOSED)),
)

TRANSITIONS: dict[Key, tuple[State, tuple[Command, ...]]] = {
    (State.NEW, Accepted, None): (State.OPENING, (Arm(Timer.CONNECT), OpenUpstream())),
    (State.OPENING, UpstreamOpen, None): (State.RELAYING, (Arm(Timer.IDLE), StartRelay())),
    (State.OPENING, UpstreamFailed, None): _reset(Reason.CONNECT_FAILED),
    (State.OPENING, RelayFailed, Side.CLIENT): _reset(Reason.CLIENT_FAILED),
    (State.OPENING, Idle, None): _reset(Reason.CONNECT_TIMEOUT),
    (State.OPENING, Drain, None): _reset(Reason.DRAINED),
    (State.RELAYING, Eof, Side.CLIENT): (State.CLIENT_DONE, (ShutdownWrite(Side.UPSTREAM),)),
    (State.RELAYING, Eof, Side.UPSTREAM): (State.UPSTREAM_DONE, (ShutdownWrite(Side.CLIENT),)),
    (State.CLIENT_DONE, Eof, Side.UPSTREAM): _FINISHED,
    (State.UPSTREAM_DONE, Eof, Side.CLIENT): _FINISHED,
}
for _state in (State.RELAYING, State.CLIENT_DONE, State.UPSTREAM_DONE):
    # Both sides are reset, whichever broke: a FIN after a failure would tell the other that it has everything.
    TRANSITIONS[_state, RelayFailed, Side.CLIENT] = _reset(Reason.CLIENT_FAILED)
    TRANSITIONS[_state, RelayFailed, Side.UPSTREAM] = _reset(Reason.UPSTREAM_FAILED)
    TRANSITIONS[_state, Idle, None] = _reset(Reason.IDLE_TIMEOUT)
    TRANSITIONS[_state, Drain, None] = _reset(Reason.DRAINED)


class Session:
    """One flow's state. Feed it events in the order they happen and carry out what it answers, in order."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State.NEW

    def on(self, event: Event) -> list[Command]:
        """What to do about `event`. Once closed, nothing: events of the same batch may still arrive.

        Raises IllegalEvent when `event` cannot happen in this state.
        """
        if self.state is State.CLOSED:
            return []
        side = event.side if isinstance(event, Eof | RelayFailed) else None
        transition = TRANSITIONS.get((self.state, type(event), side))
        if transition is None:
            raise IllegalEvent(f"{event} while {self.state.value}")
        self.state, commands = transition
        return [_complete(command, event) for command in commands]


def _complete(command: Command, event: Event) -> Command:
    # What the table cannot know: the destination and the errno come with the event.
    if isinstance(command, OpenUpstream) and isinstance(event, Accepted):
        return OpenUpstream(event.original_dst)
    if isinstance(command, Report) and isinstance(event, UpstreamFailed | RelayFailed):
        return Report(command.reason, event.errno)
    return command
