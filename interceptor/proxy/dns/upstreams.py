"""Which resolvers are asked, and in which order. Sends nothing.

In the order given, as resolv.conf(5) has it: the second of a list may know less than the first (a cluster's names), so its
"no such name" must not win a race by default. One that seems dead (several questions in a row without an answer of any kind)
is asked after the others.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable

from interceptor.errors import ProxyError
from interceptor.proxy.original_dst import DirectDial, refuse_loop
from interceptor.sockets import Address, IpAddress, SockAddr

DNS_PORT = 53
# How long one that failed is asked last: long enough that not every question waits for it, short enough to notice its return.
DISTRUST_S = 10.0
# So many in a row: one question may be slow for reasons of its own.
DEAD_AFTER = 3


def parse_resolver(text: str) -> Address:
    """`ip`, `ip:port`, `[ip]:port`; the port is 53 unless given. Raises ProxyError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, str(DNS_PORT)
    try:
        number = int(port)
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError as error:
        raise ProxyError(f"resolver {text!r} is neither an IP address nor ip:port") from error
    if not 0 < number < 1 << 16:
        raise ProxyError(f"resolver {text!r}: {number} is no port; 1 to 65535")
    return Address(ip, number)


def parse_resolvers(
    texts: Iterable[str], own_ports: frozenset[int], is_local: Callable[[IpAddress], bool]
) -> tuple[Address, ...]:
    """All of `texts`, each once. Raises ProxyError, also for one that is this proxy itself and would ask itself for ever."""
    found = tuple(dict.fromkeys(parse_resolver(text) for text in texts))
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
