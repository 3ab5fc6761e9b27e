"""podman with CNI networks: containers made, entered and removed as an operator does."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.runtimes import image
from tests.runtimes.base import NETWORK
from tests.runtimes.node import BIN_DIR, NET_DIR, Done, Node

# crun sets limits that a container without CAP_SYS_RESOURCE may not set: those that are in force are always allowed.
CONFIGURATION = """
[containers]
default_ulimits = ["nofile={nofile}:{nofile}", "nproc={nproc}:{nproc}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["{bin}"]
network_config_dir = "{net}"
"""


@dataclass(frozen=True, slots=True)
class Podman:
    """podman on the node, with storage of its own."""

    node: Node
    publishes: bool = True

    def prepare(self) -> None:
        """Configure it and give it the image."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        nproc = Path("/proc/sys/kernel/pid_max").read_text().strip()
        text = CONFIGURATION.format(nofile=hard, nproc=nproc, bin=BIN_DIR, net=NET_DIR)
        self.node.write("/etc/containers/containers.conf", text)
        self.node.run(*self.argv("load", "--quiet", "--input", str(self.node.image)))

    def argv(self, *arguments: str) -> tuple[str, ...]:
        """podman's argv."""
        storage = str(self.node.directory / "podman")
        return (
            "podman",
            "--root",
            storage,
            "--runroot",
            "/run/podman",
            "--tmpdir",
            "/run/libpod",
            "--runtime",
            "crun",
            *arguments,
        )

    def start(self, name: str, ports: Sequence[tuple[int, int]] = ()) -> Done:
        """See Runtime."""
        published = [f"--publish={outside}:{inside}" for outside, inside in ports]
        return self.node.attempt(
            *self.argv("run", "-d", "--name", name, "--network", NETWORK, *published, image.NAME, *image.COMMAND)
        )

    def pid(self, name: str) -> int:
        """See Runtime."""
        return int(self.node.run(*self.argv("inspect", "--format", "{{.State.Pid}}", name)))

    def execute(self, name: str, uid: int, *argv: str) -> Done:
        """See Runtime."""
        return self.node.attempt(*self.argv("exec", "--user", f"{uid}:{uid}", name, *argv))

    def remove(self, name: str) -> Done:
        """See Runtime."""
        return self.node.attempt(*self.argv("rm", "--force", "--ignore", "--time", "0", name))
