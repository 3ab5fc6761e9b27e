"""Another host, beside this network namespace, to send inbound packets from: a veth pair into a namespace of its own.

The interface is there for the length of the probe only. Nothing else is changed: its addresses are of the benchmarking
networks, so no route of the namespace is touched.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from interceptor import links, netns
from interceptor.errors import InterceptorError
from interceptor.probe.paths import BESIDE, HERE, INTERFACE
from interceptor.values import Address, Family

PREFIX = {Family.V4: 30, Family.V6: 126}
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
    is_laid = False
    try:
        problem = os.read(ready, 256).decode()
        if problem:
            yield Neighbour(trouble=problem)
            return
        there = f"/proc/{child}/ns/net"
        trouble = _lay(there)
        is_laid = trouble is None
        yield Neighbour(there, trouble or _raise_both(there, families))
    finally:
        os.close(ready)
        if is_laid:
            with suppress(InterceptorError):  # somebody else's work
                # Now: with the child's namespace both ends would go, too, but some time later.
                links.remove(INTERFACE)
        os.close(parent_alive)  # the child ends
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


def _lay(there: str) -> str | None:
    """The pair between here and the namespace `there`; the reason when that fails."""
    namespace = os.open(there, os.O_RDONLY | os.O_CLOEXEC)
    try:
        links.add_veth_pair(links.End(INTERFACE), links.End(FAR_INTERFACE, namespace))
    except InterceptorError as error:
        return f"making a neighbour: {error}"
    finally:
        os.close(namespace)
    return None


def _raise_both(there: str, families: tuple[Family, ...]) -> str | None:
    """Address and raise both ends; the reason when that fails."""
    try:
        _raise(INTERFACE, [HERE[family] for family in families])
        with netns.entered(there):
            _raise(FAR_INTERFACE, [BESIDE[family] for family in families])
            links.wait_until_running(FAR_INTERFACE)
        links.wait_until_running(INTERFACE)
    except InterceptorError as error:
        return f"making a neighbour: {error}"
    return None


def _raise(interface: str, addresses: list[Address]) -> None:
    for address in addresses:
        links.add_address(interface, ipaddress.ip_interface(f"{address}/{PREFIX[Family.of(address)]}"))
    links.set_up(interface)
