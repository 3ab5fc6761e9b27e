"""Pods for tests: network namespaces of our own, joined by veth pairs, and their addresses. Knows nothing about rules.

Names are itc-t-<pid>-<n>; whatever a context manager here makes is gone when it ends.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from interceptor.netns import entered

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Pod:
    """A network namespace."""

    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def run(self, *argv: str, stdin: str = "") -> str:
        """Run a program inside, to its end; its stdout."""
        with entered(self.path):
            done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}: {done.stderr}\n{stdin}"
        return done.stdout

    def sysctl(self, name: str, value: str | None = None) -> str:
        """Set net.`name` (slashes, not dots) when a value is given; the value it had."""
        path = Path("/proc/sys/net") / name
        with entered(self.path):
            before = path.read_text().strip()
            if value is not None:
                path.write_text(value)
        return before


@contextmanager
def sysctl(pod: Pod, name: str, value: str) -> Iterator[None]:
    """net.`name` is `value` within the block."""
    before = pod.sysctl(name, value)
    try:
        yield
    finally:
        pod.sysctl(name, before)


def ip(script: str, pod: Pod | None = None) -> None:
    """Run the lines of `script` as arguments of ip(8), in `pod` or on the host."""
    argv = ["ip", *(("-n", pod.name) if pod else ()), "-batch", "-"]
    done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"ip: {done.stderr}\n{script}"


@contextmanager
def pods(count: int) -> Iterator[Sequence[Pod]]:
    """`count` namespaces with lo up, IPv6 addresses usable at once, and nothing else."""
    made = [Pod(f"itc-t-{os.getpid()}-{next(_numbers)}") for _ in range(count)]
    try:
        ip("".join(f"netns add {pod.name}\n" for pod in made))
        for pod in made:
            ip("link set lo up\n", pod)
            pod.sysctl("ipv6/conf/default/accept_dad", "0")
        yield made
    finally:
        for pod in made:
            with suppress(AssertionError):
                ip(f"netns del {pod.name}\n")


def wire(left: Pod, right: Pod, names: tuple[str, str], addresses: tuple[Sequence[str], Sequence[str]]) -> None:
    """A veth pair between two pods, up, with `addresses` (with prefix lengths) at its ends."""
    # Made inside: Linux 6.1 refuses a name that an interface of the calling namespace has, too (the host's own eth0).
    ip(f"link add {names[0]} type veth peer name {names[1]} netns {right.name}\n", left)
    for pod, name, own in zip((left, right), names, addresses, strict=True):
        ip(f"link set {name} up\n" + "".join(f"addr add {address} dev {name}{_nodad(address)}\n" for address in own), pod)


def _nodad(address: str) -> str:
    return " nodad" if ":" in address else ""


@contextmanager
def resolv_conf(pod: Pod, *servers: str) -> Iterator[None]:
    """The pod's /etc/netns/NAME/resolv.conf names these servers within the block."""
    folder = Path("/etc/netns") / pod.name
    parent_was_there = folder.parent.exists()
    folder.mkdir(parents=True)
    try:
        (folder / "resolv.conf").write_text("".join(f"nameserver {server}\n" for server in servers))
        yield
    finally:
        shutil.rmtree(folder)
        if not parent_was_there:
            with suppress(OSError):
                folder.parent.rmdir()
