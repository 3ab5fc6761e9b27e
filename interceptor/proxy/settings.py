"""What the proxy is told to do. Plain values; where they come from is the CLI's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from interceptor.values import Network, PortRange

# "dns" is the proxy's own: the TCP half of the DNS forwarder is a listener like the others.
Direction: TypeAlias = Literal["outbound", "inbound", "dns"]
Mode: TypeAlias = Literal["redirect", "tproxy", "connect"]
# "dual" is one IPv6 socket that takes v4-mapped peers too.
ListenFamily: TypeAlias = Literal["v4", "v6", "dual"]
# What can be looked for in a client's first bytes.
Kind: TypeAlias = Literal["sni", "host"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# "auto" takes the cheapest that works here (relay/choice.py).
RelayName: TypeAlias = Literal["auto", "packet", "splice", "copy"]


class Listener(NamedTuple):
    """One port the proxy listens on, and how traffic is brought to it. A tuple: looked up by, for every record."""

    direction: Direction
    mode: Mode
    port: int
    family: ListenFamily

    def __str__(self) -> str:
        return f"{self.direction} {self.mode} {self.port}/{self.family}"


@dataclass(frozen=True, slots=True)
class HeaderFor:
    """Who is sent a PROXY protocol header of `version`: inbound, applications on `ports`; outbound, servers in `networks`."""

    version: Literal["v1", "v2"]
    ports: tuple[PortRange, ...] = ()
    networks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """Everything the proxy can be told. Times are in seconds.

    own_ports: a destination that is an own address with one of these ports would loop, and is refused.
    probe_port: a captured connection to this port is answered by the proxy itself, as `interceptor probe` expects.
    upstream_mark: firewall mark (SO_MARK) of upstream sockets.
    original_source: the inbound leg dials the application from the client's own address, not from 127.0.0.6 or ::6.
    run_as: (uid, gid) to become once the listeners are bound.
    max_connections, max_connections_per_client: TCP connections open at once; None: no limit but the descriptors.
    keepalive_s: silent peers are asked after so long, and as often, whether they live; None: they are not.
    peek: what to look for in the client's first bytes.
    dns_families: those in which DNS is listened for; empty: those of `listeners`.
    packet_pins: a directory where the packet relay leaves its flows to the next proxy.
    resolvers: IP addresses, optionally `ip:port` or `[ip]:port`, to be asked in this order; dns_parallel: all at once.
    dns_cache_size: how many answers are kept; 0: none.
    virtual_interfaces: whoever comes in by these may ask, too; others only from this host.
    announce_to: own addresses to announce at, on the probe port, that the proxy is ready; empty: it does not.
    """

    listeners: tuple[Listener, ...]
    own_ports: frozenset[int]
    probe_port: int
    upstream_mark: int | None = None
    original_source: bool = False
    connect_timeout_s: float = 10.0  # ztunnel's; Linux alone would try for two minutes
    drain_deadline_s: float = 5.0  # ztunnel's; well within the 30 s Kubernetes grants
    idle_timeout_s: float | None = None
    run_as: tuple[int, int] | None = None
    udp_listeners: tuple[Listener, ...] = ()
    udp_idle_s: float = 60.0  # longer than the 30 s of nf_conntrack_udp_timeout, so the kernel forgets first
    dns_port: int | None = None
    dns_families: tuple[ListenFamily, ...] = ()
    resolvers: tuple[str, ...] = ()
    dns_parallel: bool = False
    dns_cache_size: int = 4096
    virtual_interfaces: tuple[str, ...] = ()
    relay: RelayName = "auto"
    packet_pins: str | None = None
    max_connections: int | None = None
    max_connections_per_client: int | None = None
    keepalive_s: float | None = 180.0  # ztunnel's
    peek: frozenset[Kind] = frozenset()
    header: HeaderFor | None = None
    admin_port: int | None = None
    announce_to: tuple[str, ...] = ()

    @property
    def needs_net_admin(self) -> bool:
        """Whether sockets opened while running need CAP_NET_ADMIN (SO_MARK, IP_TRANSPARENT, TCP_REPAIR)."""
        return self.original_source or self.upstream_mark is not None or bool(self.udp_listeners) or self.relay == "packet"
