"""What one DNS query costs: processor time of the proxy, from its cache and from a resolver, beside dnsmasq in its place.

As root: `python -m bench.dns [--queries 4000] [--rounds 3] [--tree PATH]`. Needs dnsmasq, which is the resolver too, in a
namespace of its own. `--tree` is another checkout whose proxy is measured beside this one. Rounds are interleaved; the best of
each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.proxy.pods import DNS, OUTBOUND, PROXY_UID, REDIRECT_RULES, V4, Pods, client, pods

WINDOW = 16  # queries under way at once
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
DEADLINE_S = 60.0
RESOLVER = f"{V4['far']}:5353"


def query(number: int, name: str) -> bytes:
    """An A query with EDNS, as stub resolvers send it."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    header = number.to_bytes(2) + b"\x01\x00\0\1\0\0\0\0\0\1"
    return header + labels + b"\0\0\1\0\1" + b"\0\0\x29\x04\xd0\0\0\0\0\0\0"


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def load(sock: socket.socket, count: int, name_of: Callable[[int], str]) -> tuple[int, float]:
    """Ask `count` questions, WINDOW at once; how many were asked again because of a loss, and the time it took."""
    sock.settimeout(1.0)
    messages = [query(number & 0xFFFF, name_of(number)) for number in range(count)]
    waiting = {number & 0xFFFF: messages[number] for number in range(WINDOW)}
    start = time.monotonic()
    for message in waiting.values():
        sock.send(message)
    sent, lost = len(waiting), 0
    while waiting:
        if time.monotonic() - start > DEADLINE_S:
            raise TimeoutError(f"{len(waiting)} questions without an answer")
        try:
            answer = sock.recv(4096)
        except TimeoutError:
            lost += len(waiting)
            for message in waiting.values():
                sock.send(message)
            continue
        if waiting.pop(int.from_bytes(answer[:2]), None) is not None and sent < count:
            waiting[sent & 0xFFFF] = messages[sent]
            sock.send(messages[sent])
            sent += 1
    return lost, time.monotonic() - start


@contextmanager
def process(where: str, *program: str, cwd: str | None = None) -> Iterator[int]:
    """A program in namespace `where`; its pid. What it says goes nowhere, so that the flow log costs what it always does."""
    started = subprocess.Popen(["ip", "netns", "exec", where, *program], stdout=subprocess.DEVNULL, cwd=cwd)
    try:
        yield started.pid
    finally:
        started.terminate()
        started.wait()


def warm_up(sock: socket.socket) -> None:
    """Wait until questions are answered."""
    sock.settimeout(0.2)
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            sock.send(query(0xFFFF, "warm.test"))
            sock.recv(4096)
        except (TimeoutError, ConnectionRefusedError):
            time.sleep(0.02)
        else:
            return
    raise TimeoutError("no answer at all")


def dnsmasq(*options: str) -> list[str]:
    """dnsmasq in the foreground with no configuration but `options`."""
    return ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--pid-file=", *options]


def contenders(tree: str | None) -> dict[str, tuple[list[str], str | None]]:
    """Name -> program and its directory."""
    listeners = [["outbound", "redirect", OUTBOUND, "v4"]]
    settings = json.dumps({"listeners": listeners, "dns_port": DNS, "resolvers": [RESOLVER], "workers": 1})
    found: dict[str, tuple[list[str], str | None]] = {"proxy": ([sys.executable, "-m", "tests.proxy.serve", settings], None)}
    if tree is not None:
        found["proxy of --tree"] = ([f"{tree}/.venv/bin/python", "-m", "tests.proxy.serve", settings], tree)
    uid = ["setpriv", f"--reuid={PROXY_UID}", f"--regid={PROXY_UID}", "--clear-groups"]
    forwarder = dnsmasq(f"--port={DNS}", f"--server={RESOLVER.replace(':', '#')}", "--cache-size=10000", "--user=")
    return {**found, "dnsmasq": ([*uid, *forwarder], None)}


def measure(made: Pods, program: list[str], cwd: str | None, count: int) -> dict[str, tuple[float, float]]:
    """Microseconds of processor time a query, and queries a second, by where the answer comes from."""
    found = {}
    with process(made.pod, *program, cwd=cwd) as pid, client(made.pod, V4["far"], 53, socket.SOCK_DGRAM) as sock:
        warm_up(sock)
        for source, name_of in (("resolver", "n{}.test".format), ("cache", lambda number: f"n{number % 100}.test")):
            before = cpu_s(pid)
            _, seconds = load(sock, count, name_of)
            found[source] = ((cpu_s(pid) - before) / count * 1e6, count / seconds)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tree")
    given = parser.parse_args()
    best: dict[tuple[str, str], tuple[float, float]] = {}
    with pods("bench-dns") as made:
        made.rules(REDIRECT_RULES)
        resolver = dnsmasq("--port=5353", "--address=/test/198.18.0.1", "--local-ttl=60", "--user=root")
        with process(made.far, *resolver):
            for _ in range(given.rounds):
                for name, (program, cwd) in contenders(given.tree).items():
                    for source, (cpu_us, rate) in measure(made, program, cwd, given.queries).items():
                        seen = best.get((name, source), (cpu_us, rate))
                        best[name, source] = (min(seen[0], cpu_us), max(seen[1], rate))
    for (name, source), (cpu_us, rate) in best.items():
        print(f"{name:16} answers from {source:9} {cpu_us:6.1f} µs of processor a query   {rate:8.0f} queries a second")


if __name__ == "__main__":
    main()
