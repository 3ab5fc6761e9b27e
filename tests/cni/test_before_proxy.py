"""Init containers under the plugin: with before_proxy bypass they have a network, and the pod is captured all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from interceptor import capture
from tests.cni.agents import agent, wait_until
from tests.cni.calling import Binary
from tests.cni.test_agent import shim
from tests.cni.test_repair import ADDRESSES, HTTP, connect, listening, metrics
from tests.rig.announcing import announce
from tests.rig.capturing import options
from tests.rig.net import Pod, pods, wire

BYPASS = {"backend": "nft", "before_proxy": "bypass"}


def reached(app: Pod, remote: Pod) -> str:
    """Who gets what `app` sends to the remote."""
    with listening(app, 15001) as proxy, listening(remote, 80) as server:
        name, *ends = connect(app, {"proxy": proxy, "remote": server})
        for end in ends:
            end.close()
        return name


@pytest.mark.parametrize("way", ["conflist", "CNI_ARGS"])
def test_an_init_container_gets_out_and_the_application_does_not(binary: Binary, way: str) -> None:
    if way == "conflist":
        config, args = binary.config(capture=BYPASS), ""
    else:
        config, args = binary.config(), "INTERCEPTOR_BEFORE_PROXY=bypass"
    with pods(2) as (app, remote):
        wire(app, remote, ("eth0", "eth0"), ([f"{ADDRESSES[0]}/24"], [f"{ADDRESSES[1]}/24"]))
        assert binary.call("ADD", app.path, config, CNI_ARGS=args).status == 0
        assert reached(app, remote) == "remote"
        assert binary.call("CHECK", app.path, config, CNI_ARGS=args).status == 0
        announce(app)
        assert reached(app, remote) == "proxy"
        assert binary.call("CHECK", app.path, config, CNI_ARGS=args).status == 0
        # A second ADD, as after a restart of the runtime, does not open it again.
        assert binary.call("ADD", app.path, config, CNI_ARGS=args).status == 0
        assert reached(app, remote) == "proxy"
        assert binary.call("DEL", app.path, config, CNI_ARGS=args).status == 0


def test_a_pod_that_lost_its_rules_is_healed_closed(runtime: Pod, tmp_path: Path) -> None:
    with pods(2) as (app, remote), agent(runtime, tmp_path) as running:
        wire(app, remote, ("eth0", "eth0"), ([f"{ADDRESSES[0]}/24"], [f"{ADDRESSES[1]}/24"]))
        binary = shim(running, runtime)
        assert binary.call("ADD", app.path, binary.config(capture=BYPASS)).status == 0
        announce(app)  # once, as proxies do that are not ours
        app.run("nft", "delete", "table", "inet", "interceptor")
        wanted = options(backend="nft", before_proxy="bypass")
        wait_until(lambda: not capture.check(wanted, netns=app.name).differences)
        assert reached(app, remote) == "proxy"


def test_a_change_of_the_rules_does_not_open_or_close_a_pod(runtime: Pod, tmp_path: Path) -> None:
    with pods(2) as (app, remote), agent(runtime, tmp_path) as running:
        wire(app, remote, ("eth0", "eth0"), ([f"{ADDRESSES[0]}/24"], [f"{ADDRESSES[1]}/24"]))
        binary = shim(running, runtime)
        assert binary.call("ADD", app.path, binary.config(capture=BYPASS)).status == 0
        wanted = options(backend="nft", before_proxy="bypass")
        for is_announced in (False, True):
            if is_announced:
                announce(app)
            app.run("nft", "insert", "rule", "inet", "interceptor", "nat_output", "accept")
            wait_until(lambda: not capture.check(wanted, netns=app.name).differences)
            assert reached(app, remote) == ("proxy" if is_announced else "remote")


def test_the_agent_counts_pods_whose_proxy_has_not_announced_itself(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    def is_counted(state: str) -> bool:
        return f'interceptor_cni_pods{{state="{state}"}} 1' in metrics(runtime)

    with agent(runtime, tmp_path, *HTTP) as running:
        binary = shim(running, runtime)
        assert binary.call("ADD", pod.path, binary.config(capture=BYPASS)).status == 0
        wait_until(lambda: is_counted("early"))
        pod.run("nft", "insert", "rule", "inet", "interceptor", "nat_output", "accept")
        running.wait_for("healed")
        assert is_counted("early")
        announce(pod)
        wait_until(lambda: is_counted("captured"))
        assert not is_counted("early")
