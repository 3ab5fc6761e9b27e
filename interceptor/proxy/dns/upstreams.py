"""Which resolvers are asked, and in which order. Sends nothing.

In the order given, as resolv.conf(5) has it: the second of a list may know less than the first (a cluster's names), so its
"no such name" must not win a race by default. One that seems dead (several questions in a row without an answer of any kind)
is asked after the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from interceptor.errors import ProxyError
from interceptor.proxy.original_dst import DirectDial, refuse_loop
from interceptor.sockets import Address, IpAddress, SockAddr
from interceptor.values import parse_servers

DNS_PORT = 53
# How long one that failed is asked last: long enough that not every question waits for it, short enough to notice its return.
DISTRUST_S = 10.0
# So many in a row: one question may be slow for reasons of its own.
DEAD_AFTER = 3


def parse_resolvers(
    texts: Iterable[str], own_ports: frozenset[int], is_local: Callable[[IpAddress], bool]
) -> tuple[Address, ...]:
    """All of `texts`, each once. Raises ProxyError, also for one that is this proxy itself and would ask itself for ever."""
    try:
        found = tuple(Address(each.ip, each.port) for each in parse_servers(",".join(texts), DNS_PORT))
    except ValueError as error:
        raise ProxyError(f"resolvers: {error}") from error
    for each in found:
        try:
            refuse_loop(each.sockaddr, own_ports, is_local)
        except DirectDial as error:
            raise ProxyError(
                f"resolver {each}: {error}, which would ask itself for ever; name the resolver behind it"
            ) from error
    return found


class Upstreams:
    """`addresses`, and which of them seem dead. `clock` is in seconds."""

    def __init__(self, addresses: tuple[Address, ...], clock: Callable[[], float]) -> None:
        self.addresses = addresses
        self.near_ends: set[SockAddr] = set()  # of the tries under way
        self._clock = clock
        self._silent: dict[Address, tuple[int, float]] = {}  # questions in vain, in a row, and when the last was

    def in_order(self) -> tuple[Address, ...]:
        """Those to ask, the first first."""
        if not self._silent:
            return self.addresses
        since = self._clock() - DISTRUST_S
        return tuple(sorted(self.addresses, key=lambda address: self._seems_dead(address, since)))

    def silent(self, address: Address) -> None:
        """It said nothing for a while, or its host said that nobody is there."""
        count, _ = self._silent.get(address, (0, 0.0))
        self._silent[address] = (count + 1, self._clock())

    def answered(self, address: Address) -> None:
        """It lives, whatever it said."""
        if self._silent:
            self._silent.pop(address, None)

    def _seems_dead(self, address: Address, since: float) -> bool:
        count, last = self._silent.get(address, (0, 0.0))
        return count >= DEAD_AFTER and last > since
