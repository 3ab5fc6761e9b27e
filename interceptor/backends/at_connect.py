"""The light front of connect.py, which takes 20 ms to import and is for few: here it costs a look for a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

from interceptor.backends.base import Difference, Observed
from interceptor.bpf import places
from interceptor.errors import Unsupported
from interceptor.plan.model import Plan

if TYPE_CHECKING:
    from interceptor.backends.connect import Switched


class NoRules:
    """The backend for a plan without rules: needs no program that writes them, and no netfilter."""

    name = "connect"
    strays: tuple[str, ...] = ()

    def apply(self, _plan: Plan) -> bool:
        """There is nothing to do."""
        return False

    def remove(self) -> bool:
        """There is nothing to remove."""
        return False

    def holds(self, _plan: Plan) -> bool:
        """There is nothing to hold."""
        return True

    def observe(self) -> Observed:
        """No chain."""
        return Observed({})

    def expected(self, _plan: Plan) -> Observed:
        """No chain."""
        return Observed({})


def require() -> None:
    """Raises Unsupported where this program or this host cannot capture at connect() at all."""
    _connect().require()


def switch_on(plan: Plan) -> Switched | None:
    """What `plan` captures at connect(), if anything; as connect.switch_on. Before the rules: what both capture is captured

    once, since a rewritten connection stays on loopback.
    """
    if plan.connect is None:
        return None
    switched: Switched = _connect().switch_on(plan.connect)
    return switched


def settle(plan: Plan, switched: Switched | None) -> bool:
    """Once the rules stand: let go of what was captured at connect() before; whether anything changed there."""
    if switched is not None:
        switched.finish()
        return switched.changed
    return plan.connect is None and switch_off()


def switch_off() -> bool:
    """Capture nothing at connect(); whether there was anything of ours."""
    if not _may_stand():
        with suppress(OSError):  # missing, or others' are in it
            os.rmdir(places.root())
        return False
    return bool(_connect().switch_off())


def differences(plan: Plan) -> Iterator[Difference]:
    """How what is captured at connect() differs from `plan`."""
    if plan.connect is not None or _may_stand():
        yield from _connect().differences(plan.connect)


def stands() -> bool:
    """Whether something is captured at connect()."""
    return _may_stand() and bool(_connect().is_there())


def _may_stand() -> bool:
    """Whether anything is pinned for this network namespace."""
    if not os.path.isdir(places.root()):
        return False
    from interceptor.bpf.cookie import netns_cookie
    from interceptor.bpf.syscall import BpfError

    try:
        return os.path.isdir(places.connect_directory(netns_cookie()))
    except BpfError:
        return False  # a kernel that has no such number has no such capture


def _connect() -> ModuleType:
    try:
        from interceptor.backends import connect
    except ImportError as error:
        raise Unsupported(
            "--outbound connect: the plugin's static file cannot load BPF programs; let the node agent do it (agentSocket), "
            "or capture by rules (redirect, tproxy)"
        ) from error
    return connect
