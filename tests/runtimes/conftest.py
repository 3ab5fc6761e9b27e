"""One node for all tests, with podman and containerd on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.servers import Server, Servers, serving
from tests.runtimes.base import Runtime
from tests.runtimes.containerd import Cri, Ctr, daemon
from tests.runtimes.node import PLUGIN, Node, node
from tests.runtimes.podman import Podman

WORLD_PORT = 9000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/runtimes/" in str(item.path):
            item.add_marker("runtimes")


@pytest.fixture(scope="session")
def machine() -> Iterator[Node]:
    """The node; what its runtimes said is shown when one fails to start."""
    assert PLUGIN.exists(), f"{PLUGIN} is missing: `make cni` builds it"
    # A unix socket's path has 107 bytes: pytest's own directories are too deep.
    with (
        tempfile.TemporaryDirectory(prefix="itc-rt-", ignore_cleanup_errors=True) as directory,
        node(Path(directory)) as made,
        daemon(made),
    ):
        yield made


@pytest.fixture(scope="session")
def runtimes(machine: Node) -> dict[str, Runtime]:
    """Each runtime by name."""
    podman = Podman(machine)
    podman.prepare()
    return {"podman": podman, "ctr": Ctr(machine), "cri": Cri(machine)}


@pytest.fixture(scope="session")
def world(machine: Node) -> Iterator[Servers]:
    """A server beyond the node, which says who asks."""
    with serving() as servers:
        servers.listen(Server("world", machine.world, uid=0), WORLD_PORT, protos=("tcp",))
        yield servers


@pytest.fixture(params=["podman", "ctr", "cri"])
def runtime(request: pytest.FixtureRequest, runtimes: dict[str, Runtime]) -> Runtime:
    """Each runtime in turn."""
    return runtimes[request.param]
