"""Policy rules and local default routes added and deleted by messages of our own, for the one program that has no packages.

The static CNI plugin is Python without site-packages: what pyroute2 does elsewhere, for `routes` alone, with its signatures.
Layout: linux/rtnetlink.h, linux/fib_rules.h. Refusals are OSError with the kernel's errno.
"""

from __future__ import annotations

import struct
from typing import Self

from interceptor import nlattr
from interceptor.backends import netlink
from interceptor.backends.netlink import Message

RTM_NEWROUTE, RTM_DELROUTE = 24, 25  # linux/rtnetlink.h, to the end of this block
RTM_NEWRULE, RTM_DELRULE = 32, 33
RTN_LOCAL = 2
RT_SCOPE_HOST = 254
RTA_OIF = 4
RTA_PRIORITY = 6
RTA_TABLE = 15
FR_ACT_TO_TBL = 1  # linux/fib_rules.h, to the end of this block
FRA_PRIORITY = 6
FRA_FWMARK = 10
FRA_TABLE = 15
FRA_FWMASK = 16
FRA_PROTOCOL = 21
# family, destination's and source's length, tos, table, protocol (a rule: 0), scope (0), type (action), flags
_HEADER = struct.Struct("=BBBBBBBBI")
_NUMBER = struct.Struct("=I")
# A table's number above 255 stands in the attribute alone.
_RT_TABLE_UNSPEC = 0


class RouteMessages:
    """As much of pyroute2's IPRoute as `routes` calls."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open between calls."""

    def rule(self, verb: str, *, family: int, priority: int, fwmark: int, fwmask: int, table: int, protocol: int) -> None:
        """`ip rule add|del`. Raises OSError."""
        attributes = {FRA_PRIORITY: priority, FRA_FWMARK: fwmark, FRA_FWMASK: fwmask, FRA_TABLE: table}
        payload = _HEADER.pack(family, 0, 0, 0, _RT_TABLE_UNSPEC, 0, 0, FR_ACT_TO_TBL, 0) + _attributes(attributes)
        payload += nlattr.attr(FRA_PROTOCOL, bytes([protocol]))
        _send(RTM_NEWRULE if verb == "add" else RTM_DELRULE, verb, payload)

    def route(self, verb: str, *, family: int, oif: int, table: int, proto: int, priority: int, **rest: str) -> None:
        """`ip route add|del local default`, of that alone. Raises OSError."""
        assert rest == {"type": "local", "dst": "default", "scope": "host"}
        header = _HEADER.pack(family, 0, 0, 0, _RT_TABLE_UNSPEC, proto, RT_SCOPE_HOST, RTN_LOCAL, 0)
        payload = header + _attributes({RTA_OIF: oif, RTA_PRIORITY: priority, RTA_TABLE: table})
        _send(RTM_NEWROUTE if verb == "add" else RTM_DELROUTE, verb, payload)


def _attributes(numbers: dict[int, int]) -> bytes:
    return b"".join(nlattr.attr(kind, _NUMBER.pack(number)) for kind, number in numbers.items())


def _send(kind: int, verb: str, payload: bytes) -> None:
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL if verb == "add" else 0
    netlink.request(netlink.NETLINK_ROUTE, [Message(kind, payload, flags)])
