"""Another host, beside this network namespace, to send inbound packets from: a veth pair into a namespace of its own.

The interface is there for the length of the probe only. Nothing else is changed: its addresses are of the benchmarking
networks, so no route of the namespace is touched.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from interceptor import netns
from interceptor.probe.paths import BESIDE, HERE, INTERFACE
from interceptor.values import Address, Family

PREFIX = {Family.V4: 30, Family.V6: 126}
IFA_F_NODAD = 0x02  # linux/if_addr.h: usable at once
FAR_INTERFACE = "itcprobe1"


@dataclass(slots=True)
class Neighbour:
    """The far end's namespace; `trouble` says why there is none."""

    namespace: str | None = None
    trouble: str | None = None

    def enter(self) -> None:
        """Move this process there for good; only in a child of its own."""
        assert self.namespace is not None
        netns.enter_for_good(self.namespace)


@contextmanager
def made(families: tuple[Family, ...]) -> Iterator[Neighbour]:
    """A neighbour for the length of the block."""
    ready, child_ready = os.pipe()
    stop, parent_alive = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.close(parent_alive)
        _hold_namespace(child_ready, stop)
    os.close(child_ready)
    os.close(stop)
    try:
        problem = os.read(ready, 256).decode()
        if problem:
            yield Neighbour(trouble=problem)
            return
        trouble = _connect(child, families)
        yield Neighbour(f"/proc/{child}/ns/net", trouble)
    finally:
        os.close(ready)
        os.close(parent_alive)  # the child ends, and with its namespace both ends of the pair
        os.waitpid(child, 0)


def _hold_namespace(ready: int, stop: int) -> None:
    """Never returns: a process whose namespace is the neighbour, until the other end of `stop` is closed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(netns.CLONE_NEWNET) != 0:
        os.write(ready, f"making a neighbour: {os.strerror(ctypes.get_errno())}; needs CAP_SYS_ADMIN".encode())
        os._exit(1)
    os.close(ready)
    os.read(stop, 1)
    os._exit(0)


def _connect(child: int, families: tuple[Family, ...]) -> str | None:
    """Lay the pair, address and raise both ends; the reason when that fails."""
    from pyroute2 import IPRoute  # 200 ms: a probe may take them
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as here:
            here.link("add", ifname=INTERFACE, kind="veth", peer={"ifname": FAR_INTERFACE, "net_ns_pid": child})
            _raise(here, INTERFACE, [HERE[family] for family in families])
        with netns.entered(f"/proc/{child}/ns/net"), IPRoute() as there:
            _raise(there, FAR_INTERFACE, [BESIDE[family] for family in families])
    except (NetlinkError, OSError) as error:
        return f"making a neighbour: {error}"
    return None


def _raise(route: object, interface: str, addresses: list[Address]) -> None:
    index = socket.if_nametoindex(interface)
    for address in addresses:
        flags = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        route.addr("add", index=index, address=str(address), prefixlen=PREFIX[Family.of(address)], **flags)  # type: ignore[attr-defined]
    route.link("set", index=index, state="up")  # type: ignore[attr-defined]
