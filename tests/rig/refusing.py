"""Do something again and again, each time with another request to the kernel, or another program, refused (`each_refused`)."""

from __future__ import annotations

import errno
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import pyroute2
import pytest

from interceptor.backends import netlink, process, routes
from interceptor.bpf import links, maps, programs, special, syscall
from interceptor.errors import BackendError, InterceptorError

MOST_CALLS = 400


NO_BUFFERS = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
# Whose, which, and what it raises.
Refusable: TypeAlias = tuple[Any, str, Exception]
KERNEL: tuple[Refusable, ...] = (
    (netlink, "request", NO_BUFFERS),
    (netlink, "transaction", NO_BUFFERS),
    (pyroute2, "IPRoute", NO_BUFFERS),
    (routes, "_change_rule", BackendError("adding a rule: refused")),
    (routes, "_change_route", BackendError("adding a route: refused")),
    (process, "run", BackendError("cannot be started")),
    *((module, "bpf", NO_BUFFERS) for module in (links, maps, programs, special, syscall) if hasattr(module, "bpf")),
    *((os, name, NO_BUFFERS) for name in ("mkdir", "rmdir", "rename", "symlink", "unlink")),
)


class Refusing:
    """Counts calls of what can be refused; the one that it is told fails before it has done anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: int, refusable: Sequence[Refusable]) -> None:
        self.calls = 0
        self.refused = refused
        for module, name, error in refusable:
            monkeypatch.setattr(module, name, self._counted(getattr(module, name), error))

    def _counted(self, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.refused:
                raise type(error)(*error.args)
            return function(*arguments, **named)

        return call


def each_refused(
    verb: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    raises: tuple[type[Exception], ...] = (InterceptorError,),
    refusable: Sequence[Refusable] = KERNEL,
) -> Iterator[tuple[int, str]]:
    """Do `verb` again and again, another call refused each time: its number, and what was said; ends when none was refused.

    `raises`: all that it may raise then.
    """
    for number in range(MOST_CALLS):
        with monkeypatch.context() as patched:
            refusing = Refusing(patched, number, refusable)
            why = refused(verb, raises)
        yield number, why
        if refusing.calls <= number:
            assert why == ""
            return
    raise AssertionError(f"more than {MOST_CALLS} calls")


def refused(verb: Callable[[], object], raises: tuple[type[Exception], ...]) -> str:
    """Why it was not done; "" when it was."""
    try:
        verb()
    except raises as error:
        return str(error)
    return ""


def descriptors() -> int:
    """How many this process holds: an agent goes on after what it was refused, and a link works as long as it is open."""
    with warnings.catch_warnings():
        # What an earlier test in this process has left open is none of this one's business.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return len(os.listdir("/proc/self/fd"))
