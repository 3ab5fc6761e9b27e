"""Signals that end the demo become an exception, once; during the tearing down they wait."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """One of ENDING arrived."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold ENDING back during the block: for what must not stop between making a thing and noting that it is there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def tearing_down(tear_down: Callable[[], None]) -> Iterator[None]:
    """Run the block, then `tear_down`: after its end, an error, or a signal, which raises Interrupted in the block.

    A signal that was ignored before, as after nohup(1) or a shell's `&`, stays ignored.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        except Interrupted:  # just before it was blocked: what it asks for is happening
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            tear_down()
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN)  # forgets what is pending: it asked for the end, and this is the end
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
