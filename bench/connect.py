"""What a connection costs under `--outbound connect`, beside rules and beside nothing. Root; Linux; a cgroup v2.

Two namespaces and a veth. One process connects and resets, in a cgroup of this process; one accepts and closes, outside it, as
the servers of excluded destinations are; a captured connection's server is the proxy, and inside. Interleaved: each round
measures every case once, so drift of the machine hits all alike. Prints for each case the median of connections a second and of
CPU time (both processes, user and system) a connection, and the ratio to `nothing` of the same round.

    python -m bench.connect [ROUNDS [CONNECTIONS [CASE...]]]
"""

from __future__ import annotations

import os
import resource
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from interceptor import capture
from interceptor.backends import cgroups
from interceptor.netns import entered
from tests.rig.capturing import options
from tests.rig.connecting import own_bpffs, own_cgroup
from tests.rig.net import Pod, ip, pods, wire

FAR, PORT, EXCLUDED, PROXY = "10.10.0.2", 80, 81, 15001
IP_TRANSPARENT = 19  # linux/in.h
RESET = struct.pack("ii", 1, 0)
OFF = {"inbound": "off"}
# Case -> (options, port that is connected to); the proxy of captured cases accepts and closes, like the server.
CASES: dict[str, tuple[dict[str, str] | None, int]] = {
    "nothing": (None, PORT),
    "connect, excluded": ({"outbound": "connect", "exclude_outbound_ports": str(EXCLUDED), **OFF}, EXCLUDED),
    "redirect, excluded": ({"outbound": "redirect", "exclude_outbound_ports": str(EXCLUDED), **OFF}, EXCLUDED),
    "tproxy, excluded": ({"outbound": "tproxy", "exclude_outbound_ports": str(EXCLUDED), **OFF}, EXCLUDED),
    "connect, captured": ({"outbound": "connect", **OFF}, PORT),
    "redirect, captured": ({"outbound": "redirect", **OFF}, PORT),
    "tproxy, captured": ({"outbound": "tproxy", **OFF}, PORT),
}


@contextmanager
def accepting(pod: Pod, port: int, *, transparent: bool = False, cgroup: str | None = None) -> Iterator[None]:
    """A process that accepts and closes, as uid 1337 and in `cgroup` if given, until the block ends."""
    with entered(pod.path):
        listening = socket.create_server(("", port), backlog=4096)
    if transparent:
        listening.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        if cgroup is not None:
            Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
        os.setgid(1337)
        os.setuid(1337)
        listening.settimeout(2)
        try:
            while True:
                accepted, _ = listening.accept()
                accepted.close()
        finally:
            os._exit(0)
    os.close(writing)
    listening.close()
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)


def connect_and_reset(pod: Pod, port: int, count: int) -> tuple[float, float]:
    """(connections a second, CPU seconds of this process) for `count` connections, one after the other."""
    with entered(pod.path):
        begin, cpu = time.perf_counter(), used(resource.RUSAGE_SELF)
        for _ in range(count):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.connect((FAR, port))
        return count / (time.perf_counter() - begin), used(resource.RUSAGE_SELF) - cpu


def used(who: int) -> float:
    """CPU seconds so far."""
    found = resource.getrusage(who)
    return found.ru_utime + found.ru_stime


def own_cgroup_directory() -> str:
    """Where this process is."""
    own = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return cgroups.mount_point() + own


def measure(pod: Pod, far: Pod, texts: dict[str, str] | None, port: int, count: int, outside: str) -> tuple[float, float]:
    """(connections a second, CPU µs a connection) of one case."""
    with ExitStack() as stack:
        if texts is not None:
            capture.enable(options(backend="nft", **texts), netns=pod.name)
            stack.callback(capture.disable, netns=pod.name)
        before = used(resource.RUSAGE_CHILDREN)
        with (
            accepting(far, port, cgroup=outside),
            accepting(pod, PROXY, transparent=bool(texts and texts["outbound"] == "tproxy")),
        ):
            rate, cpu = connect_and_reset(pod, port, count)
        # The accepting processes are reaped by now.
        return rate, (cpu + used(resource.RUSAGE_CHILDREN) - before) / count * 1e6


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
    cases = {name: CASES[name] for name in ("nothing", *(sys.argv[3:] or list(CASES)[1:]))}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    outside = own_cgroup_directory()
    with own_bpffs(), own_cgroup() as cgroup, pods(2) as (pod, far):
        wire(pod, far, ("eth0", "eth0"), (["10.10.0.1/24"], [f"{FAR}/24"]))
        ip(f"route add default via {FAR}\n", pod)
        for _ in range(rounds):
            for name, (texts, port) in cases.items():
                more = {"capture_cgroup": cgroup} if texts and texts["outbound"] == "connect" else {}
                found[name].append(measure(pod, far, texts and {**texts, **more}, port, count, outside))
    print(f"{'':20} {'conn/s':>8} {'ratio':>6} {'CPU µs':>8} {'ratio':>6}   (medians of {rounds} rounds of {count})")
    for name, results in found.items():
        rates, cpus = zip(*results, strict=True)
        rate_ratio = statistics.median(rate / base[0] for rate, base in zip(rates, found["nothing"], strict=True))
        cpu_ratio = statistics.median(cpu / base[1] for cpu, base in zip(cpus, found["nothing"], strict=True))
        print(f"{name:20} {statistics.median(rates):8.0f} {rate_ratio:6.2f} {statistics.median(cpus):8.1f} {cpu_ratio:6.2f}")


if __name__ == "__main__":
    main()
