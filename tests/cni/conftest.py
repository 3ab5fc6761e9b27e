"""Every form of the plugin, and pods for it. The host that it runs on is a namespace of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.launcher import launcher
from tests.cni.agents import agent
from tests.cni.calling import Binary
from tests.rig.net import Pod, pods

STATIC = Path(__file__).parent.parent.parent / "build/cni/interceptor-cni"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/cni/" in str(item.path):
            item.add_marker("netns")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Pod]:
    """The namespace that plays the host's."""
    with pods(1) as (made,):
        yield made


@pytest.fixture(scope="module", params=["script", "static", "agent"])
def binary(request: pytest.FixtureRequest, runtime: Pod, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Binary]:
    """Each form in turn: a script, the static file alone, the static file with a node agent."""
    if request.param == "script":
        path = tmp_path_factory.mktemp("bin") / "interceptor-cni"
        path.write_text(launcher())
        path.chmod(0o755)
        yield Binary((str(path),), runtime)
        return
    assert STATIC.exists(), f"{STATIC} is missing: `make cni` builds it"
    if request.param == "static":
        yield Binary((str(STATIC),), runtime)
        return
    with agent(runtime, tmp_path_factory.mktemp("agent")) as running:
        yield Binary((str(STATIC),), runtime, running.socket_path)


@pytest.fixture
def pod() -> Iterator[Pod]:
    """A pod's namespace, empty but for lo."""
    with pods(1) as (made,):
        yield made
