"""What keeps a TPROXY'd connection with the proxy after its SYN: by its mark alone, whatever is captured by now. Pure.

NAT stays with a connection by itself; a TPROXY'd one needs rules and a policy route for every packet. So these rules do not
follow what the Config captures, but the marks that have policy routes: those that it asks for, and those that an earlier
`init` left in the kernel. docs/decisions/0006-open-tproxy-connections.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product

from interceptor.plan.model import ConnectionMarks, Direction, Match, PolicyRoute, Rule, SetMark, Tproxy
from interceptor.values import Family, Mark, Proto


def kept(own: Mark, earlier: Iterable[PolicyRoute]) -> tuple[PolicyRoute, ...]:
    """The `earlier` routes whose connections can still be told from those of the mark `own`, in an order of their own."""
    ordered = sorted(earlier, key=lambda route: (route.mark.value, route.mark.mask, route.table, route.family.value))
    return tuple(route for route in ordered if not _confuses(ConnectionMarks.of(own), ConnectionMarks.of(route.mark)))


def _confuses(one: ConnectionMarks, other: ConnectionMarks) -> bool:
    """Whether a connection that got a mark by one of them would mean something else by the other."""
    return any(
        place != other_place and (mark.matches(other_mark.value) or other_mark.matches(mark.value))
        for (place, mark), (other_place, other_mark) in product(enumerate(_meanings(one)), enumerate(_meanings(other)))
    )


def _meanings(marks: ConnectionMarks) -> tuple[Mark, ...]:
    return marks.outbound, marks.inbound, marks.original_source


def sent(routes: Sequence[PolicyRoute]) -> Iterator[Rule]:
    """For what local processes send: round through lo to the proxy."""
    for mark, family in _marks(routes):
        marks = ConnectionMarks.of(mark)
        going = Match(family=family, proto=Proto.TCP, connmark=marks.outbound, direction=Direction.ORIGINAL)
        yield Rule(going, SetMark(mark), "sent round through lo", "--outbound")
        coming = Match(family=family, proto=Proto.TCP, connmark=marks.original_source, direction=Direction.REPLY)
        yield Rule(coming, SetMark(mark), "reply to the proxy, not to the client", "--original-source")


def replies_to_proxy(mark: Mark) -> tuple[Match, SetMark, str, str]:
    """For what answers datagrams that the proxy sent from a client's address; also an ICMP error, which belongs to them."""
    reply = Match(connmark=ConnectionMarks.of(mark).original_source, direction=Direction.REPLY)
    return reply, SetMark(mark), "reply to the proxy, not to the client", "--original-source"


def arrived(routes: Sequence[PolicyRoute], *, outbound_port: int, inbound_port: int) -> Iterator[Rule]:
    """For what came round through lo, from virtual interfaces or from outside: to the proxy's socket."""
    for mark, family in _marks(routes):
        marks = ConnectionMarks.of(mark)
        original = Match(family=family, proto=Proto.TCP, direction=Direction.ORIGINAL)
        # A SYN that meets TPROXY's old rules and REDIRECT's new ones on its way belongs to the latter: its socket has the
        # translated address. What comes in on lo was translated before it gets here, by whomever.
        for match, port, way in (
            (replace(original, in_interface="lo", connmark=marks.outbound), outbound_port, "outbound"),
            (replace(original, connmark=marks.outbound, untranslated=True), outbound_port, "outbound"),
            (replace(original, connmark=marks.inbound, untranslated=True), inbound_port, "inbound"),
        ):
            # The port counts for a SYN only; an open connection has a socket of its own, which TPROXY looks for first.
            yield Rule(match, Tproxy(port, mark), f"to the proxy's {way} port", f"--{way}-port")


def _marks(routes: Sequence[PolicyRoute]) -> Iterator[tuple[Mark, Family | None]]:
    """Each mark once for all families, or once for the one that has it."""
    for mark in dict.fromkeys(route.mark for route in routes):
        families = {route.family for route in routes if route.mark == mark}
        yield mark, None if len(families) == len(Family) else families.pop()
