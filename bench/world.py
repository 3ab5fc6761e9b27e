"""The two network namespaces that everything is measured in, and programs started in them. Knows no contender, no measure."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Literal, TypeAlias

from interceptor import netns

Direction: TypeAlias = Literal["outbound", "inbound"]
Family: TypeAlias = Literal["v4", "v6"]

ADDRESSES: dict[Family, dict[str, str]] = {
    "v4": {"pod": "10.78.0.1", "far": "10.78.0.2"},
    "v6": {"pod": "fd78::1", "far": "fd78::2"},
}
# What the kernel would else take from the machine: the same everywhere, and enough for 10,000 connections at once. Reno is the
# one congestion control that every kernel allows in every namespace; it neither paces nor, on a veth, ever loses a packet.
SYSCTLS = {
    "net.ipv4.ip_local_port_range": "16100 65500",
    "net.ipv4.tcp_congestion_control": "reno",
    "net.core.somaxconn": "65535",
    "net.ipv4.tcp_max_syn_backlog": "65535",
}
LISTEN_DEADLINE_S = 15.0
STOP_DEADLINE_S = 10.0
LISTEN = "0A"  # include/net/tcp_states.h, TCP_LISTEN, as /proc/net/tcp prints it


class Failed(SystemExit):
    """A program that had to succeed did not; the text is for the user. Uncaught, it ends us with that text."""


@dataclass(frozen=True, slots=True)
class Path:
    """Which way connections go: outbound is pod to far, inbound is far to pod. The proxy is always in the pod."""

    direction: Direction
    family: Family

    def __str__(self) -> str:
        return f"{self.direction}-{self.family}"

    @property
    def server_role(self) -> Literal["pod", "far"]:
        """The namespace of the server."""
        return "far" if self.direction == "outbound" else "pod"

    @property
    def server(self) -> str:
        """The address that clients connect to."""
        return ADDRESSES[self.family][self.server_role]


PATHS = {str(path): path for path in (Path(d, f) for d in ("outbound", "inbound") for f in ("v4", "v6"))}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class World:
    """Names of the namespaces: `pod` has the proxy, `far` is everybody else."""

    pod: str
    far: str

    def named(self, role: str) -> str:
        """The namespace of a role: pod or far."""
        return self.pod if role == "pod" else self.far

    def client(self, path: Path) -> str:
        """The namespace that the path's clients are in."""
        return self.pod if path.direction == "outbound" else self.far

    def server(self, path: Path) -> str:
        """The namespace that the path's server is in."""
        return self.named(path.server_role)

    def forget_connections(self) -> None:
        """Empty both conntrack tables: entries stay 120 s after FIN, and ten short runs would fill the table."""
        for where in (self.pod, self.far):
            run("nsenter", f"--net=/run/netns/{where}", "conntrack", "-F")


def run(*words: str, feed: str | None = None) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(words, input=feed, text=True, check=False, capture_output=True)
    if done.returncode != 0:
        raise Failed(f"{' '.join(words)}: exit {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


@contextmanager
def world() -> Iterator[World]:
    """Both namespaces with a veth pair between them; gone after the block."""
    made = World(f"itc-bench-{os.getpid()}-pod", f"itc-bench-{os.getpid()}-far")
    try:
        for where in (made.pod, made.far):
            run("ip", "netns", "add", where)
            run("ip", "-n", where, "link", "set", "lo", "up")
            run("nsenter", f"--net=/run/netns/{where}", "sysctl", "-q", "-w", *[f"{k}={v}" for k, v in SYSCTLS.items()])
        run("ip", "-n", made.pod, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", made.far)
        for role, where in (("pod", made.pod), ("far", made.far)):
            run("ip", "-n", where, "addr", "add", f"{ADDRESSES['v4'][role]}/24", "dev", "eth0")
            run("ip", "-n", where, "addr", "add", f"{ADDRESSES['v6'][role]}/64", "dev", "eth0", "nodad")
            run("ip", "-n", where, "link", "set", "eth0", "up")
        yield made
    finally:
        for where in (made.pod, made.far):
            subprocess.run(["ip", "netns", "del", where], check=False, capture_output=True)


@dataclass(slots=True)
class Program:
    """A started program and what to call it in messages."""

    name: str
    process: subprocess.Popen[str]
    stderr: IO[str]

    @property
    def pid(self) -> int:
        """Its process id; it is the program itself, not a wrapper."""
        return self.process.pid

    def wait_listening(self, *ports: int) -> None:
        """Until every port is listened on in the program's namespace. No connection is made: it would be counted."""
        deadline = time.monotonic() + LISTEN_DEADLINE_S
        while missing := set(ports) - _listening(self.pid):
            if self.process.poll() is not None:
                raise Failed(f"{self.name}: exit {self.process.returncode} before it listened: {self.said()[-2000:]}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.name}: not listening on {sorted(missing)} after {LISTEN_DEADLINE_S} s")
            time.sleep(0.01)

    def stop(self) -> str:
        """SIGTERM, then SIGKILL; what it said on stderr."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        said = self.said()
        self.stderr.close()
        return said

    def said(self) -> str:
        """Its stderr so far."""
        self.stderr.seek(0)
        return self.stderr.read()


def start(
    argv: Sequence[str],
    *,
    where: str,
    uid: int = 0,
    cpus: str | None = None,
    cgroup: str | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[str] = subprocess.DEVNULL,
) -> Program:
    """Start `argv` in namespace `where` as user `uid`, on `cpus` (a list as taskset(1) takes it) when given.

    `cgroup` is the cgroup.procs file of the one to be in.
    """
    wrapped = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', cgroup] if cgroup is not None else []
    wrapped += ["nsenter", f"--net=/run/netns/{where}"]
    if cpus is not None:
        wrapped += ["taskset", "-c", cpus]
    if uid:
        wrapped += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    # Every wrapper replaces itself by the next: the pid is the program's in the end.
    stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would stop a talkative program
    process = subprocess.Popen([*wrapped, *argv], stdin=stdin, stdout=stdout, stderr=stderr, text=True)
    return Program(os.path.basename(argv[0]), process, stderr)


def _listening(pid: int) -> set[int]:
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{name}", encoding="ascii") as table:
                rows = [line.split() for line in table][1:]
        except OSError:
            continue
        found |= {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTEN}
    return found


def tcp_counters(where: str) -> dict[str, int]:
    """A namespace's PassiveOpens, ActiveOpens ... (RFC 4022), of both families."""
    return snmp(where, "Tcp")


def snmp(where: str, group: str) -> dict[str, int]:
    """The lines of `group` (Ip, Tcp) in /proc/net/snmp of a namespace."""
    with netns.entered(netns.locate(where)), open("/proc/thread-self/net/snmp", encoding="ascii") as file:
        names, values = (line.split()[1:] for line in file if line.startswith(f"{group}:"))
    return {name: int(value) for name, value in zip(names, values, strict=True)}
