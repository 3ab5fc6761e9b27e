"""How many connections may be open at once, in all and for one client, and how many descriptors there are for them.

Counts; accepts, refuses and closes nothing itself.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

# A connection has one socket on each side. The relay's pipes are a bounded number (relay/pipes.py), counted in RESERVED.
PER_CONNECTION = 2
# Listeners, loop, netlink, log, admin port, the pipes of a relay, UDP and DNS flows: what else needs descriptors.
RESERVED = 256

TOO_MANY = "too_many_connections"
TOO_MANY_OF_CLIENT = "too_many_connections_of_client"


@dataclass(frozen=True, slots=True)
class Choice:
    """A limit, and the reason for it."""

    connections: int
    reason: str


class Limits:
    """Open connections against `total`, and against `per_client` for each client IP address; None: no such limit."""

    __slots__ = ("_clients", "_per_client", "_total", "open")

    def __init__(self, total: int | None, per_client: int | None = None) -> None:
        self._total = sys.maxsize if total is None else total
        self.open = 0
        self._per_client = per_client
        self._clients: dict[str, int] = {}

    def admit(self, client_ip: str) -> str | None:
        """Count one more connection of `client_ip`; or the reason why not, and it is not counted."""
        if self.open >= self._total:
            return TOO_MANY
        if self._per_client is not None:
            count = self._clients.get(client_ip, 0)
            if count >= self._per_client:
                return TOO_MANY_OF_CLIENT
            self._clients[client_ip] = count + 1
        self.open += 1
        return None

    def release(self, client_ip: str) -> None:
        """A connection that was admitted has ended."""
        self.open -= 1
        if self._per_client is None:
            return
        # A client without connections is forgotten, or a scan of addresses would fill the memory.
        if self._clients[client_ip] == 1:
            del self._clients[client_ip]
        else:
            self._clients[client_ip] -= 1


def raise_descriptor_limit() -> int:
    """Let this process have all the descriptors that its hard limit allows; how many that is.

    The soft limit of 1024 is for programs that use select(2) (systemd.exec(5), LimitNOFILE); we do not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def choose_total(wanted: int | None, descriptors: int, workers: int = 1) -> Choice:
    """The limit of each of `workers` processes with `descriptors` each; `wanted` in all were asked for (None: as many as go).

    Fewer than asked for are given when there are no descriptors for more: an accept that fails is worse than a refusal.
    """
    possible = max(1, (descriptors - RESERVED) // PER_CONNECTION)
    if wanted is None:
        return Choice(possible, f"what {descriptors} descriptors allow")
    share = -(-wanted // workers)
    if share > possible:
        return Choice(possible, f"{wanted} were asked for, and {descriptors} descriptors allow no more")
    return Choice(share, "--max-connections")
