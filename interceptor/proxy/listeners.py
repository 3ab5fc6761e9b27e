"""Bind what the proxy listens on, in the network namespace of the calling thread. Accepts nothing."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from interceptor.bpf.connect import Originals
from interceptor.bpf.cookie import netns_cookie_of
from interceptor.bpf.syscall import BpfError
from interceptor.errors import ProxyError
from interceptor.proxy.netns_view import NetnsView
from interceptor.proxy.raw_icmp import open_icmp
from interceptor.proxy.raw_udp import open_raw
from interceptor.proxy.settings import Listener, ProxySettings
from interceptor.sockets import Address, receive_local_address, receive_original_dst, set_transparent

Protocol: TypeAlias = Literal["tcp", "udp"]

# The kernel caps it at net.core.somaxconn, 4096 by default since 5.4; fewer would drop bursts of short connections.
BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class BoundListener:
    """A listener with its socket, and the view of the namespace it is in, which all of one `open_listeners` share."""

    listener: Listener
    protocol: Protocol
    sock: socket.socket
    view: NetnsView
    replies: socket.socket | None = None  # raw; for inbound UDP, whose replies leave from the application's own address
    originals: Originals | None = None  # for the mode connect
    errors: socket.socket | None = None  # raw ICMP; for UDP, to tell clients what cannot be reached; None: not permitted

    def close(self) -> None:
        """Stop listening. The view is closed by the proxy, once."""
        self.sock.close()
        for each in (self.replies, self.originals, self.errors):
            if each is not None:
                each.close()


def open_listeners(settings: ProxySettings) -> list[BoundListener]:
    """Bind all of `settings`' ports, on all addresses, in the current network namespace.

    Raises ProxyError naming the port and what is in the way, with nothing left bound.
    """
    view = NetnsView()
    return _bind_all(list(_wanted(settings)), view, _bind)


def open_for_workers(settings: ProxySettings, count: int) -> list[list[BoundListener]]:
    """As open_listeners, once for each of `count` processes, which share the ports (SO_REUSEPORT, socket(7)).

    Datagrams go to the first alone: a flow's must not be dealt out to several. Each process has to look at the namespace
    with a view of its own: see `with_own_view`.
    """
    first = open_listeners(settings)
    if count == 1:
        return [first]
    # Bound once without sharing, so that another proxy's ports are found to be taken, not shared with it unasked.
    view = first[0].view
    for each in first:
        if each.protocol == "tcp":
            each.sock.close()
    datagrams = [each for each in first if each.protocol == "udp"]
    streams = [(each.listener, each.protocol) for each in first if each.protocol == "tcp"]
    opened = [_bind_all(streams, view, _bind_shared) for _ in range(count)]
    return [[*opened[0], *datagrams], *opened[1:]]


def with_own_view(bound: list[BoundListener]) -> list[BoundListener]:
    """The same listeners with a view that no other process uses: a netlink socket's answers are for whoever reads first."""
    view = NetnsView()
    return [replace(each, view=view) for each in bound]


Bind: TypeAlias = Callable[[Listener, Protocol, NetnsView], socket.socket]


def _bind_all(wanted: Iterable[tuple[Listener, Protocol]], view: NetnsView, bind: Bind) -> list[BoundListener]:
    bound: list[BoundListener] = []
    try:
        for listener, protocol in wanted:
            sock = bind(listener, protocol, view)
            replies, originals = _open_replies(listener, protocol, sock), _open_originals(listener, protocol, sock)
            errors = _open_errors(listener, protocol, sock)
            bound.append(BoundListener(listener, protocol, sock, view, replies, originals, errors))
    except ProxyError:
        for each in bound:
            each.close()
        view.close()
        raise
    return bound


def _bind_shared(listener: Listener, protocol: Protocol, view: NetnsView) -> socket.socket:
    return _bind(listener, protocol, view, is_shared=True)


def _wanted(settings: ProxySettings) -> Iterator[tuple[Listener, Protocol]]:
    for listener in settings.listeners:
        yield listener, "tcp"
    for listener in settings.udp_listeners:
        yield listener, "udp"
    if settings.dns_port is not None:
        for family in settings.dns_families or dict.fromkeys(listener.family for listener in settings.listeners):
            dns = Listener("dns", "redirect", settings.dns_port, family)
            yield dns, "tcp"
            yield dns, "udp"


def _bind(listener: Listener, protocol: Protocol, view: NetnsView, is_shared: bool = False) -> socket.socket:
    family = socket.AF_INET if listener.family == "v4" else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    try:
        _configure(sock, listener, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, is_shared)
        # All addresses: REDIRECT delivers to whichever address the packet came in by.
        sock.bind(("", listener.port))
        if protocol == "tcp":
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ProxyError(_explain(error, listener, protocol, view)) from error
    sock.setblocking(False)
    return sock


def _open_replies(listener: Listener, protocol: Protocol, sock: socket.socket) -> socket.socket | None:
    if protocol != "udp" or listener.direction != "inbound":
        return None
    try:
        return open_raw(sock.family)
    except OSError as error:
        sock.close()
        raise ProxyError(f"opening a raw socket for inbound UDP replies: {error.strerror}; needs CAP_NET_RAW") from error


def _open_errors(listener: Listener, protocol: Protocol, sock: socket.socket) -> socket.socket | None:
    if protocol != "udp" or listener.direction == "dns" or listener.family == "dual":
        return None
    try:
        return open_icmp(sock.family)
    except PermissionError:
        return None  # without CAP_NET_RAW clients wait where they could know: slower, not wrong


def _open_originals(listener: Listener, protocol: Protocol, sock: socket.socket) -> Originals | None:
    if protocol != "tcp" or listener.mode != "connect":
        return None
    try:
        return Originals(netns_cookie_of(sock))
    except BpfError as error:
        sock.close()
        raise ProxyError(f"original destinations of {listener}: {error}") from error


def _configure(sock: socket.socket, listener: Listener, protocol: Protocol) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, listener.family != "dual")
    if listener.mode == "tproxy":
        set_transparent(sock)
    if protocol == "tcp":
        # A restart must not wait for TIME_WAIT. Two listeners still exclude each other; two UDP sockets would not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it: no Nagle delay on top of the peers' own.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    elif listener.direction == "dns":
        receive_local_address(sock)
    else:
        receive_original_dst(sock)


def _explain(error: OSError, listener: Listener, protocol: str, view: NetnsView) -> str:
    what = f"listening on {protocol} port {listener.port} ({listener.direction}, {listener.mode}, {listener.family})"
    if error.errno == errno.EADDRINUSE:
        return f"{what}: the port is taken{_taken_by(listener, protocol, view)}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"{what}: {error.strerror}; needs CAP_NET_ADMIN for tproxy, CAP_NET_BIND_SERVICE for ports under 1024"
    return f"{what}: {error.strerror}"


def _taken_by(listener: Listener, protocol: str, view: NetnsView) -> str:
    any_address = ipaddress.ip_address("127.0.0.1" if listener.family == "v4" else "::1")
    number = socket.IPPROTO_TCP if protocol == "tcp" else socket.IPPROTO_UDP
    try:
        owner = view.netlink.listener_owner(number, Address(any_address, listener.port))
    except OSError:
        owner = None  # only the name is lost; that the port is taken is said either way
    if owner is None:
        return ""
    process = view.finder.find(owner.inode)
    return f" by {process.command} (pid {process.pid}, uid {owner.uid})" if process else f" by a process of uid {owner.uid}"
