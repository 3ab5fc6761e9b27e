"""One life of capture in a namespace of its own: init, check, probe, clean; and what the kernel held before and after.

Runs inside the machine. Programs that the machine lacks are looked for where the init script hid them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HIDDEN = "/opt/hidden"
WHERE = f"/usr/sbin:/usr/bin:{HIDDEN}"
POD, FAR = "itc-pod", "itc-far"
STATE = (
    "nft --stateless list ruleset",
    *(f"{ip}tables-{kind}-save" for kind in ("nft", "legacy") for ip in ("ip", "ip6")),
    "ip rule",
    "ip -6 rule",
    "ip route show table all",
    "ip -6 route show table all",
    "ip -o addr",
)
EMPTY = re.compile(r"^(#.*|\*\w+|:[A-Z]+ ACCEPT \[\d+:\d+\]|COMMIT)\n", re.MULTILINE)
ADDRESSES = {POD: ("10.9.0.1/24", "fd09::1/64"), FAR: ("10.9.0.2/24", "fd09::2/64")}
INTERCEPTOR = (sys.executable, "-m", "interceptor")


@dataclass(frozen=True, slots=True)
class Step:
    """A command's exit status and what it said, on stderr and stdout."""

    status: int
    said: str


@dataclass(frozen=True, slots=True)
class Trial:
    """`backend` is the one that init chose. `left` is how the state differs from before at the end; "" when not at all."""

    init: Step
    backend: str
    check: Step | None
    probe: Step | None
    clean: Step
    left_by_init: str
    left: str


def trial(arguments: Sequence[str]) -> Trial:
    """`interceptor init ARGUMENTS` in a pod; when it succeeds, check and probe too; clean always."""
    with pod() as name:
        before = state(name)
        init = _interceptor("init", "--netns", name, "--json", *arguments)
        captured = init.status == 0
        after_init = state(name)
        check = _interceptor("check", "--netns", name, *arguments) if captured else None
        probe = _interceptor("probe", "--netns", name, *arguments) if captured else None
        clean = _interceptor("clean", "--netns", name)
        return Trial(
            init,
            json.loads(init.said)["backend"] if captured else "",
            check,
            probe,
            clean,
            "" if captured else difference(before, after_init),
            difference(before, state(name)),
        )


def state(name: str) -> dict[str, str]:
    """All that capture may touch in the namespace, as far as the machine's programs can list it."""
    found = {}
    for command in STATE:
        done = subprocess.run(
            ["ip", "netns", "exec", name, *command.split()], capture_output=True, text=True, check=False, env={"PATH": WHERE}
        )
        # An empty table is what the kernel makes when one is looked into, and cannot be taken away; so are built-in chains.
        found[command] = EMPTY.sub("", done.stdout + done.stderr)
    return found


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    """What came and went, a line each; empty when nothing did."""
    lines = []
    for command, text in before.items():
        was, now = text.splitlines(), after[command].splitlines()
        lines += [f"{command}: gone: {line}" for line in was if line not in now]
        lines += [f"{command}: new: {line}" for line in now if line not in was]
    return "\n".join(lines)


def _interceptor(*arguments: str) -> Step:
    done = subprocess.run([*INTERCEPTOR, *arguments], capture_output=True, text=True, check=False, timeout=600)
    return Step(done.returncode, (done.stderr + done.stdout).strip())


@contextmanager
def pod() -> Iterator[str]:
    """A pod with a default route in each family that this kernel has."""
    v6 = _has_v6()
    try:
        for name in (POD, FAR):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", POD, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", FAR)
        for name, (address, address_v6) in ADDRESSES.items():
            if v6:
                # No link-local address, which would come while we look.
                _ip("-n", name, "link", "set", "eth0", "addrgenmode", "none")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "addr", "add", address, "dev", "eth0")
            if v6:
                _ip("-n", name, "addr", "add", address_v6, "dev", "eth0", "nodad")
        _ip("-n", POD, "route", "add", "default", "via", "10.9.0.2")
        if v6:
            _ip("-n", POD, "route", "add", "default", "via", "fd09::2")
        yield POD
    finally:
        for name in (POD, FAR):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _has_v6() -> bool:
    # ipv6.disable=1 leaves no such file; ipv6.disable_ipv6=1 sets it to 1.
    off = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    return off.exists() and off.read_text().strip() == "0"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def main() -> None:
    """Print a trial of each command line on stdin."""
    for line in sys.stdin:
        done = trial(line.split())
        print(f"### init {line.strip()} -> {done.init.status} {done.backend}", flush=True)
        print(done.init.said if done.init.status else "", flush=True)
        for name in ("check", "probe", "clean"):
            step = getattr(done, name)
            if step is not None and step.status:
                print(f"  {name}: {step.status}: {step.said}", flush=True)
        for name in ("left_by_init", "left"):
            if getattr(done, name):
                print(f"  {name}: {getattr(done, name)}", flush=True)


if __name__ == "__main__":
    os.chdir("/project")
    main()
