"""The life of one TCP flow as a table: an event in, commands out. No sockets, no clock, no bytes, no objects made.

It sees only edges (accepted, open, end of stream, failure), so any relay can move the bytes: copy, splice, the kernel alone.
What comes with an event (an errno) and what a command needs (a socket) is the connection's to keep.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple


class Side(Enum):
    """The two sides of a relay."""

    CLIENT = "client"
    UPSTREAM = "upstream"

    @property
    def other(self) -> Side:
        """The opposite side."""
        return Side.UPSTREAM if self is Side.CLIENT else Side.CLIENT


class State(IntEnum):
    """Where a flow is. *_DONE: that side has sent its FIN, the other still speaks. (IntEnum: hashed in C.)"""

    NEW = 0
    LISTENING = 1  # for the client's first bytes, before anything is dialled
    OPENING = 2
    RELAYING = 3
    CLIENT_DONE = 4
    UPSTREAM_DONE = 5
    CLOSED = 6


class Event(IntEnum):
    """What happens to a flow. Failures come with an errno, which the session does not look at."""

    ACCEPTED = 0  # a captured connection, whose original destination is known
    ACCEPTED_UNHEARD = 1  # the same, and the client's first bytes are wanted before it is dialled
    HEARD = 2  # the client's first bytes are known, or will not come
    UPSTREAM_OPEN = 3
    UPSTREAM_REFUSED = 4  # it cannot be established
    CLIENT_EOF = 5  # the client has ended its stream, and everything it sent was written to the upstream
    UPSTREAM_EOF = 6
    CLIENT_FAILED = 7  # it is broken: reset, timed out
    UPSTREAM_FAILED = 8
    TIME_UP = 9  # the state's time limit has passed: nothing happened
    DRAIN = 10  # the proxy stops now: the drain deadline has passed


class Command(IntEnum):
    """What the connection has to do."""

    LISTEN = 0  # wait for the client's first bytes, without taking them
    DIAL = 1
    START_RELAY = 2  # move bytes both ways until told to stop
    END_CLIENT = 3  # send FIN to the client; it may still speak
    END_UPSTREAM = 4
    FINISH = 5  # close both sides: all is well
    RESET = 6  # close both sides with RST: all is not well
    REPORT = 7  # the flow is over: record it


class Reason(Enum):
    """Why a flow ended; `text` is what is reported (and an attribute, which `value` is not: that costs two calls)."""

    CLOSED = "closed"
    CLIENT_FAILED = "client_failed"
    UPSTREAM_FAILED = "upstream_failed"
    CONNECT_FAILED = "connect_failed"
    CONNECT_TIMEOUT = "connect_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    DRAINED = "drained"

    def __init__(self, text: str) -> None:
        self.text = text


class Transition(NamedTuple):
    """What an event leads to. The reason is given with REPORT."""

    state: State
    commands: tuple[Command, ...]
    reason: Reason | None = None


class IllegalEvent(Exception):
    """An event that cannot happen in this state: a bug in whoever sent it."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"{event.name} while {state.name}")


def _reset(reason: Reason) -> Transition:
    # Both sides, whichever broke: a FIN after a failure would tell the other that it has everything.
    return Transition(State.CLOSED, (Command.RESET, Command.REPORT), reason)


_FINISHED = Transition(State.CLOSED, (Command.FINISH, Command.REPORT), Reason.CLOSED)
_DIAL = Transition(State.OPENING, (Command.DIAL,))
_STOP = {Event.CLIENT_FAILED: _reset(Reason.CLIENT_FAILED), Event.DRAIN: _reset(Reason.DRAINED)}
_BREAK = {
    **_STOP,
    Event.UPSTREAM_FAILED: _reset(Reason.UPSTREAM_FAILED),
    Event.TIME_UP: _reset(Reason.IDLE_TIMEOUT),
}

TRANSITIONS: dict[State, dict[Event, Transition]] = {
    State.NEW: {
        Event.ACCEPTED: _DIAL,
        Event.ACCEPTED_UNHEARD: Transition(State.LISTENING, (Command.LISTEN,)),
    },
    State.LISTENING: {
        Event.HEARD: _DIAL,
        Event.TIME_UP: _DIAL,  # a client that waits for the server's greeting
        **_STOP,
    },
    State.OPENING: {
        Event.UPSTREAM_OPEN: Transition(State.RELAYING, (Command.START_RELAY,)),
        Event.UPSTREAM_REFUSED: _reset(Reason.CONNECT_FAILED),
        Event.TIME_UP: _reset(Reason.CONNECT_TIMEOUT),
        **_STOP,
    },
    State.RELAYING: {
        Event.CLIENT_EOF: Transition(State.CLIENT_DONE, (Command.END_UPSTREAM,)),
        Event.UPSTREAM_EOF: Transition(State.UPSTREAM_DONE, (Command.END_CLIENT,)),
        **_BREAK,
    },
    State.CLIENT_DONE: {Event.UPSTREAM_EOF: _FINISHED, **_BREAK},
    State.UPSTREAM_DONE: {Event.CLIENT_EOF: _FINISHED, **_BREAK},
    # Events of the same batch may still arrive.
    State.CLOSED: {event: Transition(State.CLOSED, ()) for event in Event},
}


def advance(state: State, event: Event) -> Transition:
    """What `event` leads to in `state`: feed the events in the order they happen, carry the commands out in order.

    For whoever is not in a hurry: `connection` looks the table up by itself.

    Raises IllegalEvent when `event` cannot happen in `state`.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalEvent(state, event) from None
