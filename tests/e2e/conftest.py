"""A machine of our own: a "host" namespace, and a "world" namespace beyond it with an HTTP and a DNS server. Real sockets, no internet."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HOST_V4, WORLD_V4 = "198.18.0.1", "198.18.0.2"
HOST_V6, WORLD_V6 = "2001:db8:5::1", "2001:db8:5::2"
HTTP_PORT = 8000
NAME = "www.interceptor.test"
INTERCEPTOR = (sys.executable, '/tmp/itc.py')
UNPRIVILEGED = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
DEADLINE_S = 20.0


def sh(*argv: str, stdin: str | None = None) -> str:
    """The stdout of `argv`, which must succeed."""
    return subprocess.run(argv, check=True, text=True, capture_output=True, timeout=DEADLINE_S, input=stdin).stdout


def wait_for(condition, what: str) -> None:
    """Until `condition()` is true; fails after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.01)


RULES = ("nft list ruleset", "iptables-save", "ip6tables-save", "ip rule", "ip -6 rule")
LINKS = ("ip route show table all", "ip -6 route show table all", "ip -o addr", "ip -o link")


def kernel_state(netns: str | None) -> str:
    """All that could be left behind in a namespace, as text. None: the machine that the tests run on, others' links aside."""
    inside, commands = ((), RULES) if netns is None else (("ip", "netns", "exec", netns), RULES + LINKS)
    shown = "\n".join(f"{command}\n{sh(*inside, *command.split())}" for command in commands)
    return "\n".join(line for line in shown.splitlines() if not line.startswith("# "))  # comments hold the time


def processes(marker: str) -> list[str]:
    """The command lines that hold `marker`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in line:
            found.append(f"{entry.name} {line}")
    return found


@dataclass(frozen=True)
class Machine:
    """The two namespaces' names, and a directory for files."""

    host: str
    world: str
    directory: Path

    def command(self, *args: str, user: tuple[str, ...] = ()) -> list[str]:
        """An argv that runs `interceptor ARGS` on the host."""
        return ["ip", "netns", "exec", self.host, *user, *INTERCEPTOR, *args]

    def interceptor(self, *args: str, user: tuple[str, ...] = (), stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """`interceptor ARGS` on the host, run to its end."""
        return subprocess.run(
            self.command(*args, user=user), text=True, capture_output=True, timeout=DEADLINE_S, input=stdin, check=False
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    directory = tmp_path_factory.mktemp("machine")
    host, world = f"itc-e2e-{os.getpid()}-h", f"itc-e2e-{os.getpid()}-w"
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for netns in (host, world):
            sh("ip", "netns", "add", netns)
            # The host's own resolv.conf may name anything: this one names the server in the world.
            Path(f"/etc/netns/{netns}").mkdir(parents=True)
            Path(f"/etc/netns/{netns}/resolv.conf").write_text(f"nameserver {WORLD_V4}\noptions timeout:2 attempts:1\n")
        sh("ip", "link", "add", "veth0", "netns", host, "type", "veth", "peer", "name", "veth0", "netns", world)
        for netns, v4, v6 in ((host, HOST_V4, HOST_V6), (world, WORLD_V4, WORLD_V6)):
            lines = ("link set lo up", "link set veth0 addrgenmode none", "link set veth0 up", f"addr add {v4}/24 dev veth0",
                     f"addr add {v6}/64 dev veth0 nodad")  # fmt: skip
            sh("ip", "-netns", netns, "-batch", "-", stdin="\n".join(lines))
        for server in ("http_server.py", "dns_server.py"):
            path = str(Path(__file__).with_name(server))
            servers.append(
                subprocess.Popen(["ip", "netns", "exec", world, sys.executable, path], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
            )
            assert servers[-1].stdout is not None
            assert servers[-1].stdout.readline() == b"ready\n"
        yield Machine(host, world, directory)
    finally:
        for process in servers:
            process.kill()
            process.communicate()
        for netns in (host, world):
            subprocess.run(["ip", "netns", "del", netns], check=False, capture_output=True)
            Path(f"/etc/netns/{netns}/resolv.conf").unlink(missing_ok=True)
            Path(f"/etc/netns/{netns}").rmdir()
