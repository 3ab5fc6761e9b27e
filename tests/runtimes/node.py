"""A node of our own: network, mounts and processes apart from the machine's, and a "world" beyond it. No internet, no registry.

    world (198.18.7.2, 2001:db8:7::2) ==== node (.1) ---- bridge or ptp ---- containers

What a runtime writes into /etc, /opt, /run or /var/lib goes to overlays that vanish with the node; storage of images, which an
overlay can't hold, goes to the node's directory. Every process in the node ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.rig.net import Pod, ip, pods, wire
from tests.runtimes import image

NODE = {"v4": "198.18.7.1", "v6": "2001:db8:7::1"}
WORLD = {"v4": "198.18.7.2", "v6": "2001:db8:7::2"}
DEADLINE_S = 60.0  # a runtime's first start on a busy machine
PLUGIN = Path(__file__).parents[2] / "build/cni/interceptor-cni"
# Debian's place of the reference plugins.
PRIMARY_PLUGINS = "/usr/lib/cni"
NET_DIR, BIN_DIR = "/etc/cni/net.d", "/opt/cni/bin"

# crun refuses a hierarchy of both cgroup versions; without the second it finds the first alone.
# SIGCHLD ignored: orphans, which come to this process, are reaped by the kernel.
PREPARE = """
set -eu
work=$1
for place in /etc /opt /var/lib; do
    mkdir -p "$work/overlay$place/upper" "$work/overlay$place/work"
    mount -t overlay overlay -o "lowerdir=$place,upperdir=$work/overlay$place/upper,workdir=$work/overlay$place/work" "$place"
done
mount -t tmpfs tmpfs /run
mount -t proc proc /proc
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
rm -rf /etc/cni /opt/cni /var/lib/cni /var/lib/containerd
mkdir -p /etc/cni/net.d /opt/cni/bin /run/lock /run/netns
cp /usr/lib/cni/* /opt/cni/bin/
trap '' CHLD
echo ready
exec sleep infinity
"""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command gave."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Node:
    """`net` and `world` are namespaces; `directory` holds what is large or is looked at afterwards."""

    net: Pod
    world: Pod
    directory: Path
    keeper: int

    @property
    def image(self) -> Path:
        """The containers' image, as a file."""
        return self.directory / "image.tar"

    def inside(self, *argv: str) -> list[str]:
        """An argv that runs `argv` on the node."""
        return ["nsenter", "-t", str(self.keeper), "-m", "-n", "-p", "--", *argv]

    def attempt(self, *argv: str, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> Done:
        """Run to its end, whatever comes."""
        done = subprocess.run(
            self.inside(*argv),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
            env=None if environment is None else {**os.environ, **environment},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def run(self, *argv: str, stdin: str | None = None) -> str:
        """The stdout of a command that must succeed."""
        done = self.attempt(*argv, stdin=stdin)
        assert done.status == 0, f"{' '.join(argv)}: exit {done.status}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for `condition`; fail when it does not come."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"never: {what}"
            time.sleep(0.05)

    def interceptor(self, *arguments: str) -> str:
        """The stdout of `interceptor ARGUMENTS`."""
        return self.run(sys.executable, "-m", "interceptor", *arguments)

    def write(self, path: str, text: str) -> None:
        """A file as the node sees it."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", path, stdin=text)

    def read(self, path: str) -> str:
        """A file's text; "" when it is missing."""
        return self.run("sh", "-c", '[ ! -e "$1" ] || cat "$1"', "sh", path)

    def end(self, running: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
        """SIGTERM to a program that inside() started, and wait for it. nsenter, which stands before it, passes no signal on."""
        with open(f"/proc/{running.pid}/task/{running.pid}/children", encoding="ascii") as children:
            for pid in children.read().split():
                os.kill(int(pid), signal.SIGTERM)
        running.wait(timeout=DEADLINE_S)

    def netns_of(self, pid: int) -> str:
        """The network namespace of a process on the node, as a path that the tests can use."""
        return f"/proc/{self.keeper}/root/proc/{pid}/ns/net"

    def addresses_in_use(self) -> list[str]:
        """What host-local has given out and not taken back."""
        listed = self.run("sh", "-c", "find /var/lib/cni -type f 2>/dev/null || :").split()
        return [
            path for path in listed if Path(path).name not in ("lock", "cni.lock") and not Path(path).name.startswith("last_")
        ]


@contextmanager
def node(directory: Path) -> Iterator[Node]:
    """A node with nothing on it but Debian's plugins."""
    (directory / "image.tar").write_bytes(image.archive())
    with pods(2) as (net, world):
        wire(net, world, ("uplink", "eth0"), tuple([f"{at['v4']}/24", f"{at['v6']}/64"] for at in (NODE, WORLD)))  # type: ignore[arg-type]
        ip("".join(f"route add default via {address}\n" for address in NODE.values()), world)
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            net.sysctl(name, "1")
        argv = [
            "nsenter",
            f"--net={net.path}",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            PREPARE,
            "sh",
        ]
        with subprocess.Popen([*argv, str(directory)], stdout=subprocess.PIPE, text=True) as outer:
            assert outer.stdout is not None
            try:
                assert outer.stdout.readline() == "ready\n", "the node was not made"
                yield Node(net, world, directory, _child(outer.pid))
            finally:
                outer.kill()
                outer.wait()
                _remove_empty_cgroups()


def _remove_empty_cgroups() -> None:
    # The runtimes' parents of containers' cgroups, which they leave; one that holds anything cannot be removed.
    for name in ("libpod_parent", "k8s.io"):
        for parent in (*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}")):
            for path in (*sorted(parent.rglob("*/"), reverse=True), parent):
                with suppress(OSError):
                    path.rmdir()


def _child(pid: int) -> int:
    # unshare --fork: its child is the first process of the node.
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
