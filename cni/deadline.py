"""An end for one request that this process carries out itself: its deadline, or SIGTERM. By signals, so not for threads."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from types import FrameType

from cni import plugin, protocol
from cni.plugin import Result
from cni.protocol import CniError


class _Ended(BaseException):
    """Not an Exception: nothing on the way may take it for an ordinary failure and go on. A program that runs then is ended."""


def within(
    seconds: float | None,
    work: Callable[[], Result],
    environment: Mapping[str, str],
    stdin: bytes,
    say: Callable[[str], None],
) -> Result:
    """`work()`. When it takes longer, or SIGTERM ends it, DEL and GC end well, STATUS "not available", the others with "try

    again later" or as `onFailure` has it.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        # Once: the answer must get out.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Ended(f"within {seconds:g} s" if number == signal.SIGALRM else "before SIGTERM ended it")

    if seconds is None:
        return work()
    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, end)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return work()
    except _Ended as ended:
        command = environment.get("CNI_COMMAND", "")
        if command in ("DEL", "GC"):
            return 0, None
        code = protocol.NOT_AVAILABLE if command == "STATUS" else protocol.TRY_AGAIN_LATER
        error = CniError(code, f"{command} was not done {ended}", "a program or lock was waited for")
        return plugin.not_done(environment, stdin, error, say)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
