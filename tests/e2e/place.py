"""Two pods for `init` and `proxy` as a user starts them: one that is captured, and one beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.rig.net import Pod, ip, pods, wire
from tests.rig.servers import Server, serving

NETS = {"v4": ("10.8.0.1", "10.8.0.2", "127.0.0.6"), "v6": ("fd08::1", "fd08::2", "::6")}


@dataclass(frozen=True, slots=True)
class Place:
    """The captured pod and another one, which each run a server on port 80."""

    pod: Pod
    far: Pod


@contextmanager
def built() -> Iterator[Place]:
    """The two, joined."""
    with pods(2) as (pod, far), serving() as servers:
        ends = [[f"{net[end]}/{24 if '.' in net[end] else 64}" for net in NETS.values()] for end in (0, 1)]
        wire(pod, far, ("eth0", "eth0"), (ends[0], ends[1]))
        ip(f"route add default via {NETS['v4'][1]}\nroute add default via {NETS['v6'][1]}\n", pod)
        servers.listen(Server("app", pod, uid=1000), 80)
        servers.listen(Server("far", far, uid=0), 80)
        yield Place(pod, far)


def interceptor(*arguments: str) -> list[str]:
    """The command line for it."""
    return [sys.executable, "-m", "interceptor", *arguments]


def at(address: str, port: int = 80) -> str:
    """As ask() takes it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
