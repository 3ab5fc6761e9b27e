"""Playbooks: events in, commands out. No socket is opened here."""

from __future__ import annotations

import errno
from ipaddress import ip_address

import pytest

from interceptor.proxy.session import (
    Accepted,
    Arm,
    Close,
    Command,
    Drain,
    Eof,
    Event,
    How,
    Idle,
    IllegalEvent,
    OpenUpstream,
    Reason,
    RelayFailed,
    Report,
    Session,
    ShutdownWrite,
    Side,
    StartRelay,
    State,
    Timer,
    UpstreamFailed,
    UpstreamOpen,
)
from interceptor.sockets import Address

CLIENT = Address(ip_address("10.0.0.1"), 40000)
SERVER = Address(ip_address("10.0.0.2"), 80)
ACCEPTED = Accepted(CLIENT, SERVER)
FIN_BOTH: list[Command] = [Close(Side.CLIENT, How.FIN), Close(Side.UPSTREAM, How.FIN)]
RESET_BOTH: list[Command] = [Close(Side.CLIENT, How.RESET), Close(Side.UPSTREAM, How.RESET)]


def play(*events: Event) -> tuple[Session, list[Command]]:
    """A session fed with `events`, and what it answered to the last."""
    session = Session()
    commands: list[Command] = []
    for event in events:
        commands = session.on(event)
    return session, commands


def test_accepted_dials_the_original_destination_under_a_timer() -> None:
    assert play(ACCEPTED)[1] == [Arm(Timer.CONNECT), OpenUpstream(SERVER)]


def test_open_upstream_starts_the_relay() -> None:
    assert play(ACCEPTED, UpstreamOpen())[1] == [Arm(Timer.IDLE), StartRelay()]


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_first_fin_is_passed_on_and_the_other_half_lives(side: Side) -> None:
    session, commands = play(ACCEPTED, UpstreamOpen(), Eof(side))
    assert commands == [ShutdownWrite(side.other)]
    assert session.state is not State.CLOSED


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_second_fin_closes_both_in_order(side: Side) -> None:
    session, commands = play(ACCEPTED, UpstreamOpen(), Eof(side), Eof(side.other))
    assert commands == [*FIN_BOTH, Report(Reason.CLOSED)]
    assert session.state is State.CLOSED


ENDS: dict[str, tuple[tuple[Event, ...], Report]] = {
    "upstream refuses": ((UpstreamFailed(errno.ECONNREFUSED),), Report(Reason.CONNECT_FAILED, errno.ECONNREFUSED)),
    "connect timer": ((Idle(),), Report(Reason.CONNECT_TIMEOUT)),
    "drained while opening": ((Drain(),), Report(Reason.DRAINED)),
    "client gives up while opening": (
        (RelayFailed(Side.CLIENT, errno.ECONNRESET),),
        Report(Reason.CLIENT_FAILED, errno.ECONNRESET),
    ),
    "client resets": (
        (UpstreamOpen(), RelayFailed(Side.CLIENT, errno.ECONNRESET)),
        Report(Reason.CLIENT_FAILED, errno.ECONNRESET),
    ),
    "upstream resets": (
        (UpstreamOpen(), RelayFailed(Side.UPSTREAM, errno.ECONNRESET)),
        Report(Reason.UPSTREAM_FAILED, errno.ECONNRESET),
    ),
    "client resets after the upstream's FIN": (
        (UpstreamOpen(), Eof(Side.UPSTREAM), RelayFailed(Side.CLIENT, errno.EPIPE)),
        Report(Reason.CLIENT_FAILED, errno.EPIPE),
    ),
    "upstream resets after its own FIN": (
        (UpstreamOpen(), Eof(Side.UPSTREAM), RelayFailed(Side.UPSTREAM, errno.EPIPE)),
        Report(Reason.UPSTREAM_FAILED, errno.EPIPE),
    ),
    "idle": ((UpstreamOpen(), Idle()), Report(Reason.IDLE_TIMEOUT)),
    "idle half-closed": ((UpstreamOpen(), Eof(Side.CLIENT), Idle()), Report(Reason.IDLE_TIMEOUT)),
    "drained": ((UpstreamOpen(), Drain()), Report(Reason.DRAINED)),
}


@pytest.mark.parametrize(("events", "report"), ENDS.values(), ids=ENDS.keys())
def test_whatever_goes_wrong_resets_both_sides_and_says_why(events: tuple[Event, ...], report: Report) -> None:
    assert play(ACCEPTED, *events)[1] == [*RESET_BOTH, report]


@pytest.mark.parametrize("late", [Eof(Side.CLIENT), RelayFailed(Side.UPSTREAM, 104), Idle(), Drain(), UpstreamOpen()], ids=str)
def test_a_closed_session_answers_nothing(late: Event) -> None:
    assert play(ACCEPTED, Drain(), late)[1] == []


@pytest.mark.parametrize(
    "events",
    [
        (UpstreamOpen(),),
        (ACCEPTED, ACCEPTED),
        (ACCEPTED, Eof(Side.CLIENT)),
        (ACCEPTED, UpstreamOpen(), *2 * [Eof(Side.CLIENT)]),
    ],
    ids=["open before accepted", "accepted twice", "end before open", "end twice"],
)
def test_an_impossible_event_is_named(events: tuple[Event, ...]) -> None:
    with pytest.raises(IllegalEvent, match="while"):
        play(*events)
