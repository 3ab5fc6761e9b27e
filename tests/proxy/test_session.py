"""Playbooks: events in, commands out. No socket is opened here."""

from __future__ import annotations

import pytest

from interceptor.proxy.session import TRANSITIONS, Command, Event, IllegalEvent, Reason, State, Transition, advance

EOF = {"client": Event.CLIENT_EOF, "upstream": Event.UPSTREAM_EOF}
END = {"client": Command.END_CLIENT, "upstream": Command.END_UPSTREAM}
OTHER = {"client": "upstream", "upstream": "client"}
OPEN = (Event.ACCEPTED, Event.UPSTREAM_OPEN)


def play(*events: Event) -> Transition:
    """What the last of `events` led to."""
    reached = Transition(State.NEW, ())
    for event in events:
        reached = advance(reached.state, event)
    return reached


def test_accepted_dials() -> None:
    assert play(Event.ACCEPTED).commands == (Command.DIAL,)


@pytest.mark.parametrize("event", [Event.HEARD, Event.TIME_UP], ids=lambda event: event.name)
def test_a_client_that_is_to_be_heard_first_is_dialled_when_it_spoke_or_keeps_silent(event: Event) -> None:
    assert play(Event.ACCEPTED_UNHEARD).commands == (Command.LISTEN,)
    assert play(Event.ACCEPTED_UNHEARD, event) == play(Event.ACCEPTED)


def test_open_upstream_starts_the_relay() -> None:
    assert play(*OPEN).commands == (Command.START_RELAY,)


@pytest.mark.parametrize("side", EOF)
def test_first_fin_is_passed_on_and_the_other_half_lives(side: str) -> None:
    reached = play(*OPEN, EOF[side])
    assert reached.commands == (END[OTHER[side]],)
    assert reached.state is not State.CLOSED


@pytest.mark.parametrize("side", EOF)
def test_second_fin_closes_both_in_order(side: str) -> None:
    reached = play(*OPEN, EOF[side], EOF[OTHER[side]])
    assert reached == Transition(State.CLOSED, (Command.FINISH, Command.REPORT), Reason.CLOSED)


ENDS: dict[str, tuple[tuple[Event, ...], Reason]] = {
    "upstream refuses": ((Event.ACCEPTED, Event.UPSTREAM_REFUSED), Reason.CONNECT_FAILED),
    "connect limit": ((Event.ACCEPTED, Event.TIME_UP), Reason.CONNECT_TIMEOUT),
    "drained while opening": ((Event.ACCEPTED, Event.DRAIN), Reason.DRAINED),
    "client gives up while opening": ((Event.ACCEPTED, Event.CLIENT_FAILED), Reason.CLIENT_FAILED),
    "client gives up before it spoke": ((Event.ACCEPTED_UNHEARD, Event.CLIENT_FAILED), Reason.CLIENT_FAILED),
    "drained before it spoke": ((Event.ACCEPTED_UNHEARD, Event.DRAIN), Reason.DRAINED),
    "client resets": ((*OPEN, Event.CLIENT_FAILED), Reason.CLIENT_FAILED),
    "upstream resets": ((*OPEN, Event.UPSTREAM_FAILED), Reason.UPSTREAM_FAILED),
    "client resets after the upstream's FIN": ((*OPEN, Event.UPSTREAM_EOF, Event.CLIENT_FAILED), Reason.CLIENT_FAILED),
    "upstream resets after its own FIN": ((*OPEN, Event.UPSTREAM_EOF, Event.UPSTREAM_FAILED), Reason.UPSTREAM_FAILED),
    "idle": ((*OPEN, Event.TIME_UP), Reason.IDLE_TIMEOUT),
    "idle half-closed": ((*OPEN, Event.CLIENT_EOF, Event.TIME_UP), Reason.IDLE_TIMEOUT),
    "drained": ((*OPEN, Event.DRAIN), Reason.DRAINED),
}


@pytest.mark.parametrize(("events", "reason"), ENDS.values(), ids=ENDS.keys())
def test_whatever_goes_wrong_resets_both_sides_and_says_why(events: tuple[Event, ...], reason: Reason) -> None:
    assert play(*events) == Transition(State.CLOSED, (Command.RESET, Command.REPORT), reason)


@pytest.mark.parametrize("late", list(Event), ids=lambda event: event.name)
def test_a_closed_session_answers_nothing(late: Event) -> None:
    assert play(Event.ACCEPTED, Event.DRAIN, late) == Transition(State.CLOSED, ())


def test_every_state_but_the_first_can_be_drained() -> None:
    assert [state for state in State if Event.DRAIN not in TRANSITIONS[state]] == [State.NEW]


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.name)
def test_a_reason_is_given_with_a_report_and_only_then(state: State) -> None:
    for reached in TRANSITIONS[state].values():
        assert (Command.REPORT in reached.commands) == (reached.reason is not None)


@pytest.mark.parametrize(
    "events",
    [
        (Event.UPSTREAM_OPEN,),
        (Event.ACCEPTED, Event.ACCEPTED),
        (Event.ACCEPTED, Event.CLIENT_EOF),
        (*OPEN, *2 * [Event.CLIENT_EOF]),
    ],
    ids=["open before accepted", "accepted twice", "end before open", "end twice"],
)
def test_an_impossible_event_is_named(events: tuple[Event, ...]) -> None:
    with pytest.raises(IllegalEvent, match=f"{events[-1].name} while"):
        play(*events)
