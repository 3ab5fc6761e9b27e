"""A deadline for one request that this process carries out itself. Not for threads: it works by SIGALRM."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from types import FrameType

from cni import plugin, protocol
from cni.plugin import Result
from cni.protocol import CniError


class _TimeUp(BaseException):
    """Not an Exception: nothing on the way may take it for an ordinary failure and go on."""


def within(
    seconds: float | None,
    work: Callable[[], Result],
    environment: Mapping[str, str],
    stdin: bytes,
    say: Callable[[str], None],
) -> Result:
    """`work()`; when it takes longer, DEL ends well, the others with "try again later" or as `onFailure` has it."""

    def time_is_up(_number: int, _frame: FrameType | None) -> None:
        raise _TimeUp

    if seconds is None:
        return work()
    before = signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work()
    except _TimeUp:
        command = environment.get("CNI_COMMAND", "")
        if command == "DEL":
            return 0, None
        error = CniError(
            protocol.TRY_AGAIN_LATER, f"{command} was not done within {seconds:g} s", "a program or lock was waited for"
        )
        return plugin.not_done(environment, stdin, error, say)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
