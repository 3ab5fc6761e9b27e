"""The light front of connect.py, which takes 20 ms to import and is for few: here it costs a look for a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from interceptor.backends.base import Difference, Observed
from interceptor.bpf import places
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

    def observe(self) -> Observed:
        """No chain."""
        return Observed({})

    def expected(self, _plan: Plan) -> Observed:
        """No chain."""
        return Observed({})


def switch_on(plan: Plan) -> Switched | None:
    """What `plan` captures at connect(), if anything; as connect.switch_on. Before the rules: what both capture is captured

    once, since a rewritten connection stays on loopback.
    """
    if plan.connect is None:
        return None
    from interceptor.backends import connect

    return connect.switch_on(plan.connect)


def settle(plan: Plan, switched: Switched | None) -> bool:
    """Once the rules stand: let go of what was captured at connect() before; whether anything changed there."""
    if switched is not None:
        switched.finish()
        return switched.changed
    return plan.connect is None and switch_off()


def switch_off() -> bool:
    """Capture nothing at connect(); whether there was anything of ours."""
    if not os.path.isdir(places.root()):
        return False
    from interceptor.backends import connect

    return connect.switch_off()


def differences(plan: Plan) -> Iterator[Difference]:
    """How what is captured at connect() differs from `plan`."""
    if plan.connect is not None or os.path.isdir(places.root()):
        from interceptor.backends import connect

        yield from connect.differences(plan.connect)


def stands() -> bool:
    """Whether something is captured at connect()."""
    if not os.path.isdir(places.root()):
        return False
    from interceptor.backends import connect

    return connect.is_there()
