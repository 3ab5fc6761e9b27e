"""A deadline for one request that this process carries out itself. Not for threads: it works by SIGALRM."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

from cni import protocol
from cni.plugin import FAILURE, Result
from cni.protocol import CniError


class _TimeUp(BaseException):
    """Not an Exception: nothing on the way may take it for an ordinary failure and go on."""


def within(seconds: float | None, work: Callable[[], Result], command: str, stdin: bytes) -> Result:
    """`work()`; when it takes longer, DEL ends well and the others with "try again later"."""

    def time_is_up(_number: int, _frame: FrameType | None) -> None:
        raise _TimeUp

    if seconds is None:
        return work()
    before = signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work()
    except _TimeUp:
        if command == "DEL":
            return 0, None
        error = CniError(
            protocol.TRY_AGAIN_LATER, f"{command} was not done within {seconds:g} s", "a program or lock was waited for"
        )
        return FAILURE, error.to_json(protocol.error_version(stdin))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
