"""Every contract runs on each backend and family; without root or a tool it fails, it does not skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from interceptor import capture
from tests.rig.capturing import Capture, enable
from tests.rig.client import Answer, ask
from tests.rig.kernel import forget_connections
from tests.rig.world import NETS, Net, World, world

BACKENDS = ("nft", "iptables-nft", "iptables-legacy", "libiptc")
TOOLS = ("ip", "nft", "conntrack", "iptables-nft-restore", "ip6tables-nft-restore", "iptables-legacy-restore", "ip6tables-legacy-restore")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("netns")


@pytest.fixture(scope="session", autouse=True)
def _needs() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.fail(f"netns tests need root and {', '.join(missing) or 'its capabilities'}", pytrace=False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return str(request.param)


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> Net:
    """Each family's addresses in turn."""
    return NETS[request.param]


@pytest.fixture(scope="module")
def w() -> Iterator[World]:
    """The network of this module's tests."""
    with world() as built:
        yield built


@pytest.fixture
def enabled(w: World, backend: str) -> Iterator[Capture]:
    """enabled(option="text", ...): capture in w.pod with this backend; gone after the test, and its connections forgotten."""
    try:
        yield lambda **texts: enable(w.pod, backend=backend, **texts)
    finally:
        capture.disable(netns=w.pod.name)
        forget_connections(w.pod)


@pytest.fixture
def app(w: World) -> Callable[..., Answer]:
    """app(to, ...): ask as the application in w.pod; uid= and the rest as ask() takes them."""
    return lambda to, **how: ask(w.pod, to, **how)


@pytest.fixture
def client(w: World) -> Callable[..., Answer]:
    """client(to, ...): ask from the far side."""
    return lambda to, **how: ask(w.far, to, **{"uid": 0, **how})
