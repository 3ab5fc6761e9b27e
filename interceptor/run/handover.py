"""Hand listening sockets, and the view of the namespace they are in, from the process inside to the one outside.

An unprivileged parent may not enter its child's namespace; open descriptors pass through a unix socket all the same.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass

from interceptor import netns
from interceptor.errors import InterceptorError
from interceptor.launch import CHILD_FAILED
from interceptor.proxy.listeners import BoundListener, open_listeners
from interceptor.proxy.netlink import NETLINK_SOCK_DIAG, Netlink
from interceptor.proxy.netns_view import NetnsView
from interceptor.proxy.owner import ProcessFinder
from interceptor.proxy.settings import Listener, ProxySettings

MESSAGE_SIZE = 1 << 16
DESCRIPTORS_MAX = 64  # the kernel's limit is 253 (SCM_MAX_FD, net/scm.h); two families of four ports and the view are twelve


class SetupFailed(InterceptorError):
    """The process inside could not set its namespace up; text and exit code are its own."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Handed:
    """What came out: the listeners, and (device, inode) of the namespace they are in."""

    listeners: list[BoundListener]
    namespace: tuple[int, int]


class _HandedNetlink(Netlink):
    def __init__(self, diag: socket.socket, route: socket.socket) -> None:
        self._diag = diag
        self._route = route


class _HandedView(NetnsView):
    def __init__(
        self, namespace: tuple[int, int], descriptor: int, netlink: Netlink, half_closed_timeout_s: int | None
    ) -> None:
        self._descriptor = descriptor
        self._identity = namespace
        self.netlink = netlink
        self.changes = None  # it would have to be opened inside
        self.finder = ProcessFinder(namespace)
        self.half_closed_timeout_s = half_closed_timeout_s


def send_listeners(control: socket.socket, settings: ProxySettings) -> None:
    """Bind all listeners of `settings` here and send them away. Raises ProxyError."""
    bound = open_listeners(settings)
    here = os.open(netns.CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    kinds = [[each.protocol, *each.listener] for each in bound]
    timeout_s = bound[0].view.half_closed_timeout_s
    message = json.dumps({"listeners": kinds, "namespace": netns.identity(), "half_closed_timeout_s": timeout_s})
    descriptors = [here, diag.fileno(), route.fileno(), *(each.sock.fileno() for each in bound)]
    socket.send_fds(control, [message.encode()], descriptors)
    for each in bound:
        each.close()
    bound[0].view.close()
    diag.close()
    route.close()
    os.close(here)


def send_failure(control: socket.socket, error: InterceptorError) -> None:
    """Send what went wrong instead."""
    control.send(json.dumps({"error": str(error), "exit_code": error.exit_code}).encode())


def receive_listeners(control: socket.socket) -> Handed:
    """What send_listeners() or send_failure() sent. Raises SetupFailed."""
    received, descriptors, _flags, _address = socket.recv_fds(control, MESSAGE_SIZE, DESCRIPTORS_MAX)
    if not received:
        raise SetupFailed("setting up the command's network namespace failed; see above", CHILD_FAILED)
    message = json.loads(received)
    if "error" in message:
        raise SetupFailed(message["error"], message["exit_code"])
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    device, inode = message["namespace"]
    here, diag, route, *sockets = descriptors
    netlink = _HandedNetlink(socket.socket(fileno=diag), socket.socket(fileno=route))
    view = _HandedView((device, inode), here, netlink, message["half_closed_timeout_s"])
    listeners = [
        BoundListener(Listener(*listener), protocol, socket.socket(fileno=descriptor), view)
        for (protocol, *listener), descriptor in zip(message["listeners"], sockets, strict=True)
    ]
    for each in listeners:
        each.sock.setblocking(False)
    return Handed(listeners, (device, inode))
