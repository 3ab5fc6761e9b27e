"""What rules need around them, the same for every backend: TPROXY's policy routes, and ::6 on lo. No rules here.

Owned by marks in the kernel, never by memory of ours: routes and ip rules carry our protocol number, the address a flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from interceptor.backends import address, cttimeout, routes
from interceptor.backends.base import Difference
from interceptor.errors import BackendError
from interceptor.plan.model import Plan, PolicyRoute


def standing_routes() -> tuple[PolicyRoute, ...]:
    """The policy routes of ours that stand, without halves that a crash left."""
    return tuple(route for route in routes.present() if route.mark != routes.NO_MARK and route.table != routes.NO_TABLE)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepare() added; falsy when nothing."""

    before: tuple[PolicyRoute, ...]
    added_routes: bool
    added_address: bool

    def __bool__(self) -> bool:
        return self.added_routes or self.added_address

    def undo(self) -> None:
        """Back to what was there before, for when the rules could not be written."""
        if self.added_routes:
            routes.ensure(self.before)
        if self.added_address:
            address.remove_inbound_source()


def prepare(plan: Plan) -> Prepared:
    """Add what `plan` needs and take nothing away: old rules may still use the rest.

    Before the rules: a packet that is marked before its route exists would leave uncaptured. Raises BackendError when another
    program's route or rule would take packets that are meant for the proxy.
    """
    _refuse_others(plan)
    before = routes.present()
    missing = tuple(route for route in plan.routes if route not in before)
    absent = plan.inbound_source_v6 and address.inbound_source_state() == "absent"
    try:
        if missing:
            routes.ensure((*before, *missing))
        if absent:
            address.add_inbound_source()
    except Exception:  # also what no backend foresaw, as EMFILE: half of it is worse than any
        Prepared(before, bool(missing), added_address=False).undo()
        raise
    return Prepared(before, bool(missing), absent)


def _refuse_others(plan: Plan) -> None:
    if not plan.routes:
        return
    from interceptor.backends import foreign_routes  # for the few plans that have routes

    for winning in foreign_routes.overriding(plan.routes):
        raise BackendError(
            f"another program's route wins over ours in {winning}. Packets for the proxy would take it. "
            "Delete it, or `clean` and give another --tproxy-table. Nothing was changed"
        )
    for winning in foreign_routes.outranking(plan.routes):
        raise BackendError(
            f"another program's {winning} stands before ours ({routes.PRIORITY}), and packets for the proxy would take it. "
            f"Delete it, or give it a priority over {routes.PRIORITY}. Nothing was changed"
        )


def tidy(plan: Plan | None) -> bool:
    """Take away what `plan` does not need (None: all that is ours), once its rules stand; whether there was anything."""
    wanted = plan.routes if plan is not None else ()
    stale = any(route not in wanted for route in routes.present())
    if stale:
        routes.ensure(wanted)
    keeps_address = plan is not None and plan.inbound_source_v6
    unaddressed = not keeps_address and address.inbound_source_state() == "ours" and address.remove_inbound_source()
    abandoned = plan is None and _remove_abandoned_timeouts()
    return stale or unaddressed or abandoned


def _remove_abandoned_timeouts() -> bool:
    """Those that a run left which was killed between its rules and its policies; whether there were any."""
    if not cttimeout.existing():
        return False
    from interceptor.backends import timeouts_in_use  # hardly ever needed, and each pod's end waits for its import

    return timeouts_in_use.remove_unused("nft", "legacy")


def state() -> tuple[object, ...]:
    """What stands now, to be compared with a later look."""
    return routes.present(), address.inbound_source_state()


def differences(plan: Plan) -> Iterator[Difference]:
    """How the kernel differs from what `plan` needs."""
    present = routes.present()
    for route in plan.routes:
        if route not in present:
            yield Difference("missing", "policy route", str(route))
    if plan.routes:
        from interceptor.backends import foreign_routes

        for winning in foreign_routes.overriding(plan.routes):
            yield Difference("extra", "policy route", f"{winning} wins over ours")
        for winning in foreign_routes.outranking(plan.routes):
            yield Difference("extra", "policy route", f"{winning} stands before ours")
    for route in present:
        if route not in plan.routes:
            yield Difference("extra", "policy route", str(route))
    if plan.inbound_source_v6 and address.inbound_source_state() == "absent":
        yield Difference("missing", "lo", "::6/128, the source of the proxy's inbound leg")
