"""The command's side of `run`: the new namespace, its interface, rules and listeners; then the command itself.

Knows nothing about relaying: the listeners go to the parent, which dials from the host's namespace. So the host needs no
NAT, no rule and no address.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from interceptor import capture, launch, links
from interceptor.config import Config
from interceptor.errors import InterceptorError, NetnsError
from interceptor.proxy.settings import ProxySettings
from interceptor.run.handover import send_failure, send_listeners
from interceptor.values import Family, Network

# Nothing ever leaves by this interface: what is sent to it was captured before, or is lost.
INTERFACE, FAR_END = "itc0", "itc1"
# RFC 7600's dummy address, and one of RFC 6666's discard prefix: no host on earth has them, so none is hidden by them.
ADDRESSES: dict[Family, links.Interface] = {
    Family.V4: ipaddress.ip_interface("192.0.0.8/32"),
    Family.V6: ipaddress.ip_interface("100::8/128"),
}
CAP_NET_RAW = 13  # linux/capability.h
# unshare(2) on CLONE_NEWUSER; "No space left on device" would mislead.
REFUSALS = {
    errno.ENOSPC: "no more user namespaces are allowed here",
    errno.EPERM: "user namespaces are forbidden here",
    errno.EINVAL: "this kernel has no user namespaces",
}
HELP = (
    "Run it as root, or allow unprivileged user namespaces: sysctl kernel.unprivileged_userns_clone=1 (Debian), "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu)"
)


@dataclass(frozen=True, slots=True)
class Job:
    """What to run, and how it is captured. `reach`: where the host has routes to; elsewhere the command has none either."""

    argv: tuple[str, ...]
    config: Config
    settings: ProxySettings
    reach: tuple[Network, ...]
    signal_mask: frozenset[int]


def live(job: Job, control: socket.socket) -> None:
    """Be the command: set all up, hand the listeners over `control`, wait for the word, exec. Returns only when that failed."""
    parent = os.getppid()
    try:
        with_user_namespace = _enter_new_namespace()
        _furnish(job)
        send_listeners(control, job.settings)
    except InterceptorError as error:
        send_failure(control, error)
        return
    if with_user_namespace:
        launch.drop_ambient_capabilities()
    launch.die_with(parent)
    if control.recv(1) != b"g":
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, job.signal_mask)
    try:
        launch.exec_command(job.argv)
    except OSError as error:
        control.send(json.dumps({"errno": error.errno}).encode())


def _enter_new_namespace() -> bool:
    """Leave the host's network namespace; whether that took a user namespace."""
    uid, gid = os.geteuid(), os.getegid()
    with contextlib.suppress(PermissionError):
        launch.unshare(launch.CLONE_NEWNET)
        return False
    try:
        launch.unshare(launch.CLONE_NEWUSER | launch.CLONE_NEWNET)
        _write("/proc/self/setgroups", "deny")  # user_namespaces(7): before an unprivileged gid_map
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        launch.keep_capabilities_over_exec((launch.CAP_NET_ADMIN, CAP_NET_RAW))
        links.set_up("lo")
    except (OSError, InterceptorError) as error:
        reason = (REFUSALS.get(error.errno or 0) or error.strerror) if isinstance(error, OSError) else str(error)
        raise NetnsError(f"no network namespace for the command: {reason}. {HELP}") from error
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _furnish(job: Job) -> None:
    links.set_up("lo")
    links.add_veth_pair(links.End(INTERFACE), links.End(FAR_END))
    links.set_up_without_arp(FAR_END)
    links.set_up_without_arp(INTERFACE)
    for family in _families(job.reach):
        links.add_address(INTERFACE, ADDRESSES[family])
    for network in job.reach:
        links.add_route(INTERFACE, network)
    capture.enable(job.config)


def _families(reach: Sequence[Network]) -> Iterator[Family]:
    reached = {Family.of(network) for network in reach}
    return (family for family in Family if family in reached)
