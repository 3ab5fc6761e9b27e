"""What every runtime under test can do. The contract tests know no more of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tests.runtimes.node import Done, Node

NETWORK = "podnet"  # the name of every conflist's network


class Runtime(Protocol):
    """A container runtime on a node. Names of containers are the caller's."""

    node: Node
    publishes: bool  # whether it can be asked to map ports

    def start(self, name: str, ports: Sequence[tuple[int, int]] = ()) -> Done:
        """Start the application in a pod of that name; `ports` are (the node's, its own)."""

    def pid(self, name: str) -> int:
        """A process in the pod's network namespace, as the node numbers it."""

    def execute(self, name: str, uid: int, *argv: str) -> Done:
        """Run a program in the pod's container as a user: image.UID or 1337."""

    def remove(self, name: str) -> Done:
        """Remove the pod, running or not; what is not there is no error."""
