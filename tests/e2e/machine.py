"""A machine of our own: a "host" namespace, and a "world" beyond it with an HTTP and a DNS server. No internet."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HOST_V4, WORLD_V4 = "198.18.0.1", "198.18.0.2"
HOST_V6, WORLD_V6 = "2001:db8:5::1", "2001:db8:5::2"
HTTP_PORT = 8000
NAME = "www.interceptor.test"
INTERCEPTOR = (sys.executable, "-m", "interceptor")
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
