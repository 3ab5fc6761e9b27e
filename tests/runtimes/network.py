"""The node's CNI network, as an operator has it before our plugin comes, and our plugin in it, put there by our installer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.runtimes.base import NETWORK
from tests.runtimes.node import NET_DIR, PLUGIN, Node

PATH = f"{NET_DIR}/10-{NETWORK}.conflist"
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
# Subnets of each primary plugin's own, so that what one leaves behind doesn't meet the other.
SUBNETS = {"bridge": ("10.97.1.0/24", "fd97:1::/64"), "ptp": ("10.97.2.0/24", "fd97:2::/64")}


def conflist(primary: str) -> str:
    """bridge or ptp with host-local, both families, then portmap: as text, with an operator's indentation."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": subnet}] for subnet in SUBNETS[primary]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    first: dict[str, Any] = {"type": primary, "ipMasq": True, "ipam": ipam}
    if primary == "bridge":
        first |= {"bridge": "cni-bridge", "isGateway": True}
    return json.dumps({"cniVersion": "1.0.0", "name": NETWORK, "plugins": [first, PORTMAP]}, indent=4) + "\n"


AGENT_SOCKET = "/run/interceptor/cni.sock"
# Who does the plugin's work, and what the installer is told for it.
WORKERS: dict[str, tuple[str, ...]] = {"in-process": (), "agent": ("--agent-socket", AGENT_SOCKET)}


@contextmanager
def agent(node: Node) -> Iterator[None]:
    """The node agent runs within the block, as the DaemonSet has it: on the node's network, seeing no runtime's directory."""
    log = node.directory / "agent.log"
    argv = node.inside(sys.executable, "-m", "interceptor", "cni", "agent", "--socket", AGENT_SOCKET, "--http", "off")
    with log.open("a") as stderr:
        running = subprocess.Popen(argv, stderr=stderr)
    try:
        node.until(
            lambda: running.poll() is not None or node.attempt("test", "-S", AGENT_SOCKET).status == 0, "the agent's socket"
        )
        assert running.poll() is None, log.read_text()
        yield
    finally:
        node.end(running)


@contextmanager
def working(node: Node, worker: str) -> Iterator[tuple[str, ...]]:
    """Whoever does the plugin's work is there; the installer's options for it."""
    if worker == "agent":
        with agent(node):
            yield WORKERS[worker]
    else:
        yield WORKERS[worker]


@contextmanager
def network(node: Node, primary: str) -> Iterator[None]:
    """The network is configured within the block, without us."""
    node.write(PATH, conflist(primary))
    try:
        yield
    finally:
        node.run("rm", PATH)


@contextmanager
def captured_network(node: Node, primary: str, *options: str) -> Iterator[None]:
    """The network, with our plugin installed by `interceptor cni install OPTIONS`; uninstalling leaves the operator's bytes."""
    with network(node, primary):
        node.interceptor("cni", "install", "--binary", str(PLUGIN), *options)
        try:
            assert node.interceptor("cni", "status") == f"installed: 10-{NETWORK}.conflist\n"
            yield
        finally:
            node.interceptor("cni", "uninstall")
        assert node.read(PATH) == conflist(primary)


@contextmanager
def network_with_entry(node: Node, primary: str, entry: dict[str, Any]) -> Iterator[None]:
    """The network with an entry of ours that the installer would refuse: an operator's slip."""
    with network(node, primary):
        node.interceptor("cni", "install", "--binary", str(PLUGIN))
        found = json.loads(node.read(PATH))
        found["plugins"][-1] = {"type": "interceptor-cni", **entry}
        node.write(PATH, json.dumps(found))
        try:
            yield
        finally:
            node.interceptor("cni", "uninstall")
        assert json.loads(node.read(PATH)) == json.loads(conflist(primary))
