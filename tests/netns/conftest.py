"""Every contract runs on each backend and family; without root or a tool it fails, it does not skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from interceptor import capture
from interceptor.plan.build import build_plan
from interceptor.plan.model import Plan
from tests.rig.capturing import Capture, options
from tests.rig.client import Answer, ask
from tests.rig.kernel import NFT_ONLY, forget_connections
from tests.rig.world import NETS, Net, World, world

BACKENDS = ("nft", "iptables-nft", "iptables-legacy", "libiptc")
TOOLS = ("ip", "nft", "conntrack")
IPTABLES = (
    "iptables-nft-restore",
    "ip6tables-nft-restore",
    "iptables-legacy-restore",
    "ip6tables-legacy-restore",
)
HERE = Path(__file__).parent
# libiptc's rules are held to iptables' own text by test_iptables_backends.py: what packets make of that text is tried on it by
# `make torture`, but for the first of the contracts.
BY_RULES = "test_contract_rules.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker("netns")
        is_contract = item.path.name.startswith("test_contract_") and item.path.name != BY_RULES
        if is_contract and _text(item, "backend") == "libiptc":
            item.add_marker("torture")
    # One capture serves neighbours that ask for the same: a backend's tests together, one mechanism's together in it.
    ours.sort(key=lambda item: (str(item.path), _param(item, "backend"), _param(item, "mechanism")))
    items[:] = [item for item in items if HERE not in item.path.parents] + ours


def _param(item: pytest.Item, name: str) -> int:
    callspec = getattr(item, "callspec", None)  # only parametrized tests have one
    return callspec.indices.get(name, -1) if callspec else -1


def _text(item: pytest.Item, name: str) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get(name, "")) if callspec else ""


@pytest.fixture(scope="session", autouse=True)
def _needs() -> None:
    missing = [tool for tool in (*TOOLS, *(() if NFT_ONLY else IPTABLES)) if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.fail(f"netns tests need root and {', '.join(missing) or 'its capabilities'}", pytrace=False)


@pytest.fixture(params=BACKENDS, scope="module")
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


@pytest.fixture(scope="module")
def _captured(w: World, backend: str) -> Iterator[Capture]:
    held: list[Plan] = []

    def ensure(**texts: str) -> None:
        config = options(backend=backend, **texts)
        prepared = capture.prepare(config, netns=w.pod.name)
        plan = build_plan(config, replace(prepared.facts, earlier_routes=()))
        if plan != prepared.plan:
            # Each contract is about what this configuration alone brings, not about what an earlier test's TPROXY leaves.
            capture.disable(netns=w.pod.name)
            held.clear()
        if held != [plan]:
            held.clear()
            capture.enable(config, netns=w.pod.name)
            held.append(plan)

    try:
        yield ensure
    finally:
        capture.disable(netns=w.pod.name)


@pytest.fixture
def enabled(w: World, _captured: Capture) -> Iterator[Capture]:
    """enabled(option="text", ...): capture in w.pod with this backend. What the test before left is replaced, not removed."""
    yield _captured
    forget_connections(w.pod)


@pytest.fixture
def app(w: World) -> Callable[..., Answer]:
    """app(to, ...): ask as the application in w.pod; uid= and the rest as ask() takes them."""
    return lambda to, **how: ask(w.pod, to, **how)


@pytest.fixture
def client(w: World) -> Callable[..., Answer]:
    """client(to, ...): ask from the far side."""
    return lambda to, **how: ask(w.far, to, **{"uid": 0, **how})
