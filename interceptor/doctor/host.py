"""Limits and switches of the kernel and the host, and who holds the proxy's ports and uid in one namespace. Reads only."""

from __future__ import annotations

import os
from collections.abc import Iterator

from interceptor import facts, netns
from interceptor.config import Config
from interceptor.doctor.finding import Finding
from interceptor.errors import NetnsError
from interceptor.values import contains, join

# A flow holds two sockets, and two pipes while bytes are moved by splice(2): six descriptors.
DESCRIPTORS_A_FLOW = 6
FEW_DESCRIPTORS = 65536  # about 10,000 flows
FULL_SHARE = 0.8  # of conntrack's table; above, bursts overflow it and packets are dropped
BACKLOG = 4096  # proxy/listeners.py asks for it
SYS = "/proc/sys/net"


def findings(config: Config) -> Iterator[Finding]:
    """Of the network namespace that the calling thread is in."""
    yield _kernel()
    yield _ipv6()
    yield _descriptors()
    yield from _conntrack()
    yield from _backlog()
    yield from _forwarding(config)
    yield from _reverse_path(config)
    yield from _ports(config)
    yield _proxy_processes(config)
    if facts.hides_service_addresses():
        advice = "the proxy gets the pod's address, not the service's. Set socketLB.hostNamespaceOnly=true in Cilium"
        yield Finding(
            "host", "Cilium", "warn", "its socket load balancing rewrites addresses before any rule sees them", advice
        )


def _kernel() -> Finding:
    return Finding("kernel", "release", "ok", f"{os.uname().release} {os.uname().machine}")


def _ipv6() -> Finding:
    if not os.path.exists(f"{facts.NET}/if_inet6"):
        return Finding("kernel", "ipv6", "ok", "off in this kernel: only IPv4 is captured, and nothing can go around by IPv6")
    if _read(f"{SYS}/ipv6/conf/lo/disable_ipv6") == "1":
        advice = "rules for IPv6 are written all the same; the proxy's inbound leg has no ::6 to come from"
        return Finding("namespace", "ipv6", "warn", "no addresses: net.ipv6.conf.lo.disable_ipv6 is 1", advice)
    return Finding("namespace", "ipv6", "ok", "on")


def _descriptors() -> Finding:
    import psutil  # 20 ms

    _, hard = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
    found = "unlimited" if hard < 0 else f"{hard} open files"
    if 0 <= hard < FEW_DESCRIPTORS:
        advice = f"a proxy started from here carries about {hard // DESCRIPTORS_A_FLOW} connections at once; raise LimitNOFILE"
        return Finding("host", "open files", "warn", found, advice)
    return Finding("host", "open files", "ok", found)


def _conntrack() -> Iterator[Finding]:
    name, limit = "conntrack table", _read(f"{SYS}/netfilter/nf_conntrack_max") or _read(f"{SYS}/nf_conntrack_max")
    used = _read(f"{SYS}/netfilter/nf_conntrack_count")
    if not limit or not used:
        yield Finding("namespace", name, "unknown", "nf_conntrack is not loaded (yet)")
        return
    found = f"{used} of {limit} entries"
    if int(used) > FULL_SHARE * int(limit):
        advice = (
            "when it is full the kernel drops new connections; a captured one takes two. Raise net.netfilter.nf_conntrack_max"
        )
        yield Finding("namespace", name, "warn", found, advice)
    else:
        yield Finding("namespace", name, "ok", found)


def _backlog() -> Iterator[Finding]:
    limit = _read(f"{SYS}/core/somaxconn")
    if limit:
        advice = "bursts of new connections are dropped; raise net.core.somaxconn" if int(limit) < BACKLOG else ""
        yield Finding("namespace", "somaxconn", "warn" if advice else "ok", limit, advice)


def _forwarding(config: Config) -> Iterator[Finding]:
    """What comes in by a virtual interface and is excluded has to be forwarded."""
    if config.virtual_interfaces:
        on = _read(f"{SYS}/ipv4/ip_forward") == "1"
        advice = "" if on else "what --virtual-interfaces bring in and is excluded goes nowhere; set net.ipv4.ip_forward=1"
        yield Finding("namespace", "ip_forward", "ok" if on else "warn", "on" if on else "off", advice)


def _reverse_path(config: Config) -> Iterator[Finding]:
    """With src_valid_mark a packet's source is looked up under its mark; TPROXY's leads home, so the packet is dropped.

    Strict rp_filter alone does no harm (tests/netns/test_contract_tproxy.py passes with it). See net/ipv4/fib_frontend.c.
    """
    if not (config.uses_tproxy or config.original_source):
        return
    names = [entry.name for entry in os.scandir(f"{SYS}/ipv4/conf") if entry.name != "default"]
    on = sorted(name for name in names if _read(f"{SYS}/ipv4/conf/{name}/src_valid_mark") == "1")
    advice = "" if not on else "IPv4 that is captured by TPROXY is dropped (wg-quick sets it); set it to 0 in this namespace"
    yield Finding("namespace", "src_valid_mark", "warn" if on else "ok", f"on for {', '.join(on)}" if on else "off", advice)


def _ports(config: Config) -> Iterator[Finding]:
    import psutil

    wanted = {config.outbound_port: "outbound", config.inbound_port: "inbound", config.dns_port: "dns"}
    holders: dict[int, set[str]] = {port: set() for port in wanted}
    for each in psutil.net_connections(kind="inet"):
        is_open = each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)  # CONN_NONE: UDP
        if is_open and each.laddr and each.laddr.port in holders:
            holders[each.laddr.port].add(_process(each.pid))
    for port, direction in wanted.items():
        found = ", ".join(sorted(holders[port])) or "nobody listens"
        yield Finding("namespace", f"port {port} ({direction})", "ok", found)


def _process(pid: int | None) -> str:
    import psutil

    if pid is None:
        return "a process that cannot be seen from here"
    try:
        return f"{psutil.Process(pid).name()} (pid {pid}, uid {psutil.Process(pid).uids().effective})"
    except psutil.NoSuchProcess:
        return f"pid {pid}, which has ended meanwhile"


def _proxy_processes(config: Config) -> Finding:
    import psutil

    here = netns.identity()
    name = f"processes of uid {join(config.proxy_uid) or 'none'}"
    found = []
    for process in psutil.process_iter():
        try:
            uids = process.uids()
            if contains(config.proxy_uid, uids.effective) and netns.identity(f"/proc/{process.pid}/ns/net") == here:
                found.append(f"{process.name()} (pid {process.pid}, {_open_files(process)})")
        except (psutil.Error, NetnsError):
            continue  # it ended meanwhile, or is not ours to look at
    if len(found) > 1:
        advice = "all of them go around the proxy; applications must not run under the proxy's uid"
        return Finding("namespace", name, "warn", ", ".join(found), advice)
    return Finding("namespace", name, "ok", ", ".join(found) or "none")


def _open_files(process: object) -> str:
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        soft, _ = process.rlimit(psutil.RLIMIT_NOFILE)
        return f"{process.num_fds()} of {soft} open files"
    except psutil.AccessDenied:
        return "open files not to be seen"


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
