"""Did every connection of a run go through the proxy? By the kernel's counters of both namespaces and the proxy's own. No I/O.

A connection that goes around the proxy is faster than any proxy. Benchmarks of REDIRECT proxies count such ones without
noticing: after a reset, a reused source port meets the conntrack entry of the proxy's own connection
(docs/decisions/0002-conntrack-bypass.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.world import Direction

Counters = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Counted:
    """Connections during a run, begun and accepted in each namespace; `own` is how many the proxy says it accepted.

    `served`: how many the server accepted, where it counts them. far_passive may be more: when two acknowledgements of one
    handshake meet on two CPUs, tcp_check_req() makes two sockets of it, counts both and keeps one. Packet splice has them
    meet: B's own, and the client's first bytes.
    """

    pod_active: int
    pod_passive: int
    far_active: int
    far_passive: int
    own: int | None = None
    served: int | None = None

    @staticmethod
    def between(
        before: Mapping[str, Counters], after: Mapping[str, Counters], own: int | None, served: int | None = None
    ) -> Counted:
        """The differences of two readings of {"pod": ..., "far": ...}."""

        def grown(role: str, name: str) -> int:
            return after[role][name] - before[role][name]

        return Counted(
            grown("pod", "ActiveOpens"),
            grown("pod", "PassiveOpens"),
            grown("far", "ActiveOpens"),
            grown("far", "PassiveOpens"),
            own,
            served,
        )


def complaint(counted: Counted, direction: Direction, *, proxied: bool, slack: int) -> str | None:
    """What is wrong with a run; None when all connections went the way they should.

    `slack`: connections that may have been under way, half open, when the load ended.
    """
    if direction == "outbound":
        captured, reached = counted.pod_passive, counted.served or counted.far_passive
    else:
        # Proxy and server share the pod: what is accepted beyond one a client was accepted twice, by both.
        reached = counted.far_active
        captured = counted.pod_passive - counted.far_active
    if not reached:
        return "no connection reached the server"
    if not proxied:
        return f"{captured} connections were captured though there is no proxy" if captured > 0 else None
    # Outbound the server can't have accepted more than the proxy; inbound, some may not have been served when time was up.
    around = reached - captured - (slack if direction == "inbound" else 0)
    if around > 0:
        return f"{around} of {reached} connections went around the proxy"
    if captured - reached > slack:
        return f"{captured - reached} of {captured} connections never reached the server"
    if counted.own is not None and abs(counted.own - captured) > slack:
        return f"the proxy says it accepted {counted.own} connections, the kernel counted {captured}"
    return None
