"""Real containers of real runtimes, chained behind real primary plugins: captured, and nothing else in the world changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from interceptor import capture
from tests.rig.capturing import options
from tests.rig.kernel import snapshot
from tests.rig.servers import Servers
from tests.runtimes import image
from tests.runtimes.base import Runtime
from tests.runtimes.conftest import WORLD_PORT
from tests.runtimes.network import WORKERS, agent, captured_network, network, network_with_entry, working
from tests.runtimes.node import NODE, WORLD, Done, Node
from tests.runtimes.sidecar import addresses, page, proxying

PROXY_UID = 1337
PUBLISHED = 8090
PARALLEL = 8
CAPTURE = {"redirect": {}, "tproxy": {"outbound": "tproxy", "inbound": "tproxy"}}


@contextmanager
def pod(runtime: Runtime, name: str, *ports: tuple[int, int]) -> Iterator[int]:
    """A running pod: its pid. Removed at the end, without an address left behind."""
    started = runtime.start(name, ports)
    try:
        assert started.status == 0, started
        yield runtime.pid(name)
    finally:
        removed = runtime.remove(name)
    assert removed.status == 0, removed
    assert runtime.node.addresses_in_use() == []


def ask_world(runtime: Runtime, name: str, uid: int, family: str, wait_s: int = 5) -> Any:
    """Who answered a client in the container; None when nobody did."""
    done = runtime.execute(name, uid, "sh", "-c", f"nc -w {wait_s} {WORLD[family]} {WORLD_PORT} </dev/null")
    return json.loads(done.stdout)["server"] if done.stdout else None


@pytest.mark.parametrize(
    ("primary", "mode", "worker"),
    [
        ("bridge", "redirect", "in-process"),
        ("ptp", "tproxy", "in-process"),
        ("bridge", "tproxy", "agent"),
        ("ptp", "redirect", "agent"),
    ],
)
def test_outbound_is_captured_but_for_the_proxys(
    runtime: Runtime, world: Servers, primary: str, mode: str, worker: str
) -> None:
    with (
        working(runtime.node, worker) as installed,
        captured_network(runtime.node, primary, "--capture", json.dumps(CAPTURE[mode]), *installed),
        pod(runtime, "out") as pid,
    ):
        unproxied = [ask_world(runtime, "out", image.UID, family, wait_s=1) for family in WORLD]
        assert unproxied == [None, None], "captured, and no proxy yet"
        assert [ask_world(runtime, "out", PROXY_UID, family) for family in WORLD] == ["world", "world"]
        with proxying(runtime.node, pid, *(f"--{name}={value}" for name, value in CAPTURE[mode].items())) as flows:
            for uid in (image.UID, PROXY_UID):
                assert [ask_world(runtime, "out", uid, family) for family in WORLD] == ["world", "world"]
    assert [(flow["original_dst"], flow["uid"]) for flow in flows] == [
        (f"{WORLD['v4']}:{WORLD_PORT}", image.UID),
        (f"[{WORLD['v6']}]:{WORLD_PORT}", image.UID),
    ]


@pytest.mark.parametrize("primary", ["bridge", "ptp"])
def test_inbound_is_captured_through_a_mapped_port_too(runtime: Runtime, primary: str) -> None:
    node = runtime.node
    ports = [(PUBLISHED, image.PORT)] if runtime.publishes else []
    with captured_network(node, primary), pod(runtime, "in", *ports) as pid:
        own = addresses(node, pid)
        with proxying(node, pid) as flows:
            pages = [page(node.net.path, own[family], image.PORT) for family in own]
            pages += [page(node.world.path, NODE[family], PUBLISHED) for family in own if ports]
    assert set(pages) == {image.PAGE}
    reached = {f"{own['v4']}:{image.PORT}", f"[{own['v6']}]:{image.PORT}"}
    assert {flow["original_dst"] for flow in flows} == reached
    assert [flow["direction"] for flow in flows] == ["inbound"] * len(pages)


@pytest.mark.parametrize("worker", WORKERS)
def test_many_pods_at_once(runtime: Runtime, worker: str) -> None:
    names = [f"{worker[:2]}{number}" for number in range(PARALLEL)]
    with (
        working(runtime.node, worker) as installed,
        captured_network(runtime.node, "bridge", *installed),
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        try:
            assert [done.status for done in pool.map(runtime.start, names)] == [0] * PARALLEL
            # Eight namespaces, eight captures, each whole.
            found = [capture.check(options(), netns=runtime.node.netns_of(runtime.pid(name))).differences for name in names]
            assert found == [()] * PARALLEL
        finally:
            removed = [done.status for done in pool.map(runtime.remove, names)]
        assert removed == [0] * PARALLEL
    assert runtime.node.addresses_in_use() == []


def rules(node: Node) -> dict[str, str]:
    """The node's own rules, of nft and both iptables."""
    return {name: text for name, text in snapshot(node.net).items() if name.startswith("nft") or name.endswith("save")}


def test_no_rule_of_ours_is_on_the_node(runtime: Runtime) -> None:
    ports = [(PUBLISHED, image.PORT)] if runtime.publishes else []
    with captured_network(runtime.node, "bridge"), pod(runtime, "alive", *ports):
        alive = "".join(rules(runtime.node).values())
    assert "podnet" in alive, "the primary plugin's rules"
    assert not [word for word in ("interceptor", "INTERCEPT", "15001", "15006") if word in alive]


# Not with ctr: it calls DEL without a namespace, and there Debian's bridge plugin leaves its own rules behind.
@pytest.mark.parametrize("name", ["podman", "cri"])
def test_the_node_is_left_as_without_us(runtimes: dict[str, Runtime], machine: Node, name: str) -> None:
    with network(machine, "bridge"), pod(runtimes[name], "without", (PUBLISHED, image.PORT)):
        pass
    without_us = rules(machine)
    with captured_network(machine, "bridge"), pod(runtimes[name], "with", (PUBLISHED, image.PORT)):
        pass
    assert rules(machine) == without_us


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        pytest.param({"capture": {"outbound_port": 0}}, "outbound_port", id="an option's value"),
        pytest.param({"captured": {}}, "captured", id="an unknown key"),
    ],
)
def test_a_pod_that_cannot_be_captured_does_not_run(runtime: Runtime, entry: dict[str, Any], said: str) -> None:
    node = runtime.node
    with network_with_entry(node, "bridge", entry):
        started = runtime.start("bad")
        removed = runtime.remove("bad")
    assert started.status != 0
    assert said in started.stderr + started.stdout
    assert removed.status == 0, removed
    assert node.addresses_in_use() == []


def test_without_the_agent_no_pod_runs(runtimes: dict[str, Runtime], machine: Node) -> None:
    """All runtimes at once: the plugin waits half a minute for an agent that may be being replaced."""

    def attempt(runtime: Runtime) -> Done:
        started = runtime.start("orphan")
        assert runtime.remove("orphan").status == 0
        return started

    with (
        network_with_entry(machine, "bridge", {"agentSocket": "/run/interceptor/nobody.sock"}),
        ThreadPoolExecutor(len(runtimes)) as pool,
    ):
        found = list(pool.map(attempt, runtimes.values()))
    assert all(done.status != 0 for done in found), found
    assert all("agent cannot be reached" in done.stdout + done.stderr for done in found), found
    assert machine.addresses_in_use() == []


def test_a_pod_waits_for_an_agent_that_comes_back(runtimes: dict[str, Runtime], machine: Node) -> None:
    """An upgrade of the agent fails no pod."""
    everyone = runtimes.values()
    with ThreadPoolExecutor(len(runtimes)) as pool, ExitStack() as installed:
        with agent(machine):
            installed.enter_context(captured_network(machine, "bridge", *WORKERS["agent"]))
        started = [pool.submit(runtime.start, "waits") for runtime in everyone]
        # The primary plugin has given each its two addresses: ours is being waited for.
        machine.until(lambda: len([path for path in machine.addresses_in_use() if "networks" in path]) == 6, "three pods wait")
        assert not any(each.done() for each in started)
        with agent(machine):
            assert [each.result().status for each in started] == [0] * len(runtimes)
            found = [capture.check(options(), netns=machine.netns_of(each.pid("waits"))).differences for each in everyone]
            assert found == [()] * len(runtimes)
            assert [each.remove("waits").status for each in everyone] == [0] * len(runtimes)
    assert machine.addresses_in_use() == []
