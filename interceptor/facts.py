"""A read-only look at the host and at the network namespace we are in. Changes nothing, starts no program."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from dataclasses import replace

from interceptor import netns
from interceptor.errors import NetnsError
from interceptor.plan.model import HostFacts
from interceptor.values import Address, Family, IdRange, Network, contains

# /proc/net is the main thread's; a thread that entered another namespace must look at its own.
NET = "/proc/thread-self/net"
RESOLV_CONF = "/etc/resolv.conf"
ELSEWHERE = "192.0.2.1"  # the documentation's (RFC 5737)
ADDED_BY_US = (ipaddress.ip_address("::6"),)
# kubelet's two cgroup drivers write pod<uid> and kubepods-burstable-pod<uid with underscores>.slice.
POD_CGROUP = r"(?:^|-)pod[0-9a-f]{8}[-_][0-9a-f_-]+(?:\.slice)?$"
LOOPBACK_V6_OFF = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"
# Cilium's socket load balancer: the map that undoes its rewriting exists only with it (cilium bpf/bpf_sock.c); its agent's
# socket and conflist say that Cilium is there at all.
CILIUM_SOCKET_LB = "sys/fs/bpf/tc/globals/cilium_lb4_reverse_sk"


def look(namespace: str | None = None) -> HostFacts:
    """What any plan needs to know of the namespace we are in; `namespace` is how the user named it, for its resolv.conf."""
    return replace(
        look_for_rules(resolvers(resolv_conf_path(namespace))),
        own_addresses=_own_networks(),
        source=_source(),
        pod_cgroup=pod_cgroup(namespace),
    )


def look_for_rules(resolvers: tuple[Network, ...] = ()) -> HostFacts:
    """As much of it as rules depend on: the same in most pods, and quickly found. `resolvers`: where they count."""
    families = (Family.V4, Family.V6) if os.path.exists(f"{NET}/if_inet6") else (Family.V4,)
    return HostFacts(families, resolvers, loopback_has_v6=_read(LOOPBACK_V6_OFF).strip() == "0")


def resolv_conf_path(namespace: str | None) -> str:
    """The resolv.conf that processes of the namespace read: ip-netns(8)'s for a named one, the process's for a pid."""
    # A path of iproute2's is that name.
    namespace = (namespace or "").removeprefix(f"{netns.NAMED_DIRECTORY}/")
    if not namespace or "/" in namespace:
        return RESOLV_CONF
    if namespace.isdigit():
        return f"/proc/{namespace}/root{RESOLV_CONF}"
    named = f"/etc/netns/{namespace}/resolv.conf"
    return named if os.path.exists(named) else RESOLV_CONF


def resolvers(path: str = RESOLV_CONF) -> tuple[Network, ...]:
    """The name servers in the resolv.conf at `path` (resolv.conf(5)), without duplicates; () when there is no such file."""
    found: dict[Network, None] = {}
    for line in _read(path).splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword != "nameserver" or not rest.strip():
            continue
        address = rest.split()[0].split("%")[0]
        try:
            found[ipaddress.ip_network(address)] = None
        except ValueError:
            continue
    return tuple(found)


def local_addresses() -> frozenset[Address]:
    """The addresses of this namespace, from the kernel's own local routing tables."""
    found: set[Address] = set()
    for line in _read(f"{NET}/if_inet6").splitlines():
        found.add(ipaddress.IPv6Address(bytes.fromhex(line.split()[0])))
    previous = ""
    for line in _read(f"{NET}/fib_trie").splitlines():
        if "/32 host LOCAL" in line:
            found.add(ipaddress.IPv4Address(previous.split()[-1]))
        previous = line
    return frozenset(found)


def _own_networks() -> tuple[Network, ...]:
    """The namespace's addresses that are known before we add ::6, as networks of one address each, in order."""
    outside = (item for item in local_addresses() if not item.is_loopback and item not in ADDED_BY_US)
    return tuple(ipaddress.ip_network(item) for item in sorted(outside, key=lambda item: (item.version, int(item))))


def _source() -> Address | None:
    """What the kernel connects from to an address that nobody owns, by the default route; None without one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((ELSEWHERE, 9))  # a datagram socket: nothing is sent
        return ipaddress.ip_address(asking.getsockname()[0])
    return None


def pod_cgroup(namespace: str | None, proc: str = "/proc") -> str | None:
    """The cgroup v2 path to capture for a namespace that is named by a pid: the process's, or the Kubernetes pod's above it.

    None for a namespace that is named otherwise, and where there is no cgroup v2 ("0::" in cgroups(7)).
    """
    if namespace is None or not namespace.isdigit():
        return None
    own = next((line[3:] for line in _read(f"{proc}/{namespace}/cgroup").splitlines() if line.startswith("0::")), None)
    if own is None:
        return None
    parts = own.strip("/").split("/")
    pods = [number for number, part in enumerate(parts) if re.search(POD_CGROUP, part)]
    return "/".join(parts[: pods[-1] + 1] if pods else parts) or "/"


def processes_of(uids: tuple[IdRange, ...], proc: str = "/proc") -> list[str]:
    """ "pid (command)" of each process that runs in this network namespace under one of `uids`."""
    here = netns.identity()
    found = []
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        try:
            if contains(uids, os.stat(f"{proc}/{entry}").st_uid) and netns.identity(f"{proc}/{entry}/ns/net") == here:
                found.append(f"{entry} ({_read(f'{proc}/{entry}/comm').strip()})")
        except (OSError, NetnsError):
            continue  # it ended meanwhile, or is not ours to look at
    return found


def hides_service_addresses(root: str = "/") -> bool:
    """Whether Cilium's socket load balancing rewrites service addresses before any rule sees them."""
    return os.path.exists(os.path.join(root, CILIUM_SOCKET_LB))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
