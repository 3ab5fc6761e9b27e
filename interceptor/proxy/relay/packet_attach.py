"""Put the packet splice's programs where this namespace's packets pass: every Ethernet-like device, and lo.

Knows devices, links and maps; a flow's life is `packet`'s.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from interceptor.bpf import links, programs
from interceptor.bpf.maps import RINGBUF, Map, MapDefinition, create_map
from interceptor.bpf.ringbuf import RingBuffer
from interceptor.bpf.syscall import BpfError
from interceptor.proxy.relay import packet_layout as layout
from interceptor.proxy.relay import packet_pins

LOOPBACK = 1  # LOOPBACK_IFINDEX, include/net/net_namespace.h
SIOCGIFMTU, SIOCGIFHWADDR = 0x8921, 0x8927  # linux/sockios.h
ARPHRD_ETHER = 1  # linux/if_arp.h
NAME_SIZE = 16  # IFNAMSIZ
RING_SIZE = 1 << 20  # 20,000 ends; the reader is told of the first
# flows.h: the places of programs in `tails`
TAILS = ("unusual", "strange", "arrival", "loopback", "opener", "answer", "error_message")
RTM_SETLINK, IFLA_AF_SPEC, IFLA_INET_CONF = 19, 26, 1  # linux/rtnetlink.h, linux/if_link.h
NLM_F_REQUEST, NLM_F_ACK, NLMSG_ERROR = 1, 4, 2
IPV4_DEVCONF_ACCEPT_LOCAL, IPV4_DEVCONF_ROUTE_LOCALNET = 23, 26  # linux/ip.h


@dataclass(frozen=True, slots=True)
class Device:
    """A network interface that packets of a flow may pass."""

    name: str
    index: int
    mtu: int


@dataclass(slots=True)
class Attached:
    """The loaded programs and where they are."""

    loaded: programs.Loaded
    rings: tuple[Map, ...]  # one for each worker
    workers: int
    mtu: int = 1500  # the smallest of the devices'
    links: dict[str, links.Link] = field(default_factory=dict)  # by interface and program
    pins: str | None = None
    fresh: bool = False  # nobody's flows were in `pins`

    @property
    def maps(self) -> dict[str, Map]:
        """The maps by their names in flows.h."""
        return self.loaded.maps

    def events(self, worker: int) -> RingBuffer:
        """What the programs report to this worker."""
        return RingBuffer(self.rings[worker])

    def attach(self, name: str, index: int) -> None:
        """Have program `name` see the packets of an interface. Raises BpfError."""
        link = f"{name}-{index}"
        if link not in self.links:
            self.links[link] = links.attach_interface(self.loaded.programs[name], index)
        if self.pins is not None:
            packet_pins.keep(self.pins, packet_pins.LINK, link, self.links[link].descriptor)

    def close(self) -> None:
        """Detach, unless pinned, and let go of everything."""
        for link in self.links.values():
            link.close()
        for ring in self.rings:
            ring.close()
        self.loaded.close()

    def give_up(self) -> None:
        """The same for programs that turned out useless: what an earlier proxy had pinned stays, what is ours does not."""
        self.close()
        if self.pins is not None and self.fresh:
            packet_pins.discard(self.pins)


def attach(workers: int = 1, pins: str | None = None) -> Attached:
    """Load and attach in the current network namespace, once for all worker processes.

    Raises BpfError or OSError, with nothing left but what an earlier proxy did.

    Call it before the workers are forked: they share the maps, and a worker's flows outlive it while the descriptors do.
    pins: a directory in a bpffs (packet_pins.directory): what an earlier proxy left there is taken over.
    """
    source = programs.bundled("packet")
    for name, size in layout.SIZES.items():
        if source.maps[name].value_size != size:
            raise BpfError(f"BPF map {name}: values of {source.maps[name].value_size} bytes, not {size}: another build")
    with ExitStack() as opened:

        def owned(made: Map) -> Map:
            return opened.enter_context(closing(made))

        def left(kind: str) -> dict[str, Map]:
            if pins is None:
                return {}
            return {name: owned(packet_pins.pinned_map(pins, kind, name)) for name in packet_pins.names(pins, kind)}

        found = left(packet_pins.MAP)
        rings = [ring for _, ring in sorted(left(packet_pins.RING).items(), key=lambda named: int(named[0]))]
        fresh = not found and not rings
        new = MapDefinition("ended", RINGBUF, 0, 0, RING_SIZE)
        rings += [owned(create_map(new)) for _ in range(len(rings), workers)]
        if "rings" not in found:
            found["rings"] = owned(create_map(source.maps["rings"], rings[0]))
        attached = Attached(programs.load(source, reuse=found), tuple(rings), workers, pins=pins, fresh=fresh)
        opened.pop_all()
    try:
        _attach_all(attached)
    except BaseException:
        attached.give_up()
        raise
    return attached


def _attach_all(attached: Attached) -> None:
    for worker, ring in enumerate(attached.rings):
        attached.maps["rings"].update(struct.pack("=I", worker), struct.pack("=I", ring.descriptor))
    for place, name in enumerate(TAILS):
        program = attached.loaded.programs[name].descriptor
        attached.maps["tails"].update(struct.pack("=I", place), struct.pack("=I", program))
    if attached.pins is not None:
        for name in packet_pins.names(attached.pins, packet_pins.LINK):
            attached.links[name] = packet_pins.pinned_link(attached.pins, name)
        for name, table in attached.maps.items():
            packet_pins.keep(attached.pins, packet_pins.MAP, name, table.descriptor)
        for worker, ring in enumerate(attached.rings):
            packet_pins.keep(attached.pins, packet_pins.RING, str(worker), ring.descriptor)
    attached.attach("loopback", LOOPBACK)
    for device in devices():
        attached.attach("arrival", device.index)
        attached.attach("departure", device.index)
    attached.mtu = min((device.mtu for device in devices()), default=attached.mtu)
    allow_loopback_sources()


def devices() -> list[Device]:
    """The Ethernet-like interfaces of the current network namespace: others have headers that the programs do not know."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return [
            Device(name, index, _ask(sock, SIOCGIFMTU, name, "=I"))
            for index, name in socket.if_nameindex()
            if _ask(sock, SIOCGIFHWADDR, name, "=H") == ARPHRD_ETHER
        ]


def _ask(sock: socket.socket, question: int, name: str, form: str) -> int:
    # struct ifreq: the name, then a union
    request = struct.pack(f"{NAME_SIZE}s24x", name.encode())
    return int(struct.unpack_from(form, fcntl.ioctl(sock, question, request), NAME_SIZE)[0])


def allow_loopback_sources() -> None:
    """On lo, take packets from our own addresses and 127.0.0.0/8: translated packets arrive there without a route of their own.

    By netlink, since /proc/sys is read-only in most containers. It touches lo of this namespace alone, where nobody else can
    put a packet. Raises BpfError.
    """
    settings = b"".join(
        struct.pack("=HHI", 8, number, 1) for number in (IPV4_DEVCONF_ACCEPT_LOCAL, IPV4_DEVCONF_ROUTE_LOCALNET)
    )
    conf = struct.pack("=HH", 4 + len(settings), IFLA_INET_CONF) + settings
    inet = struct.pack("=HH", 4 + len(conf), socket.AF_INET) + conf
    body = struct.pack("=BxHiII", 0, 0, LOOPBACK, 0, 0) + struct.pack("=HH", 4 + len(inet), IFLA_AF_SPEC) + inet
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(struct.pack("=IHHII", 16 + len(body), RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        kind, number = struct.unpack_from("=H10xi", sock.recv(8192), 4)
    if kind != NLMSG_ERROR or number != 0:
        raise BpfError(f"lo: accept_local and route_localnet: errno {-number}; needs CAP_NET_ADMIN")
