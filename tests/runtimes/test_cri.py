"""What only a kubelet asks of containerd."""

from __future__ import annotations

import json

import pytest

from interceptor import capture
from tests.rig.capturing import options
from tests.runtimes.base import Runtime
from tests.runtimes.containerd import Cri
from tests.runtimes.network import captured_network
from tests.runtimes.test_contract import pod

RESOLVERS = ("10.96.0.10",)  # what Cri.start() gives each pod


@pytest.fixture
def cri(runtimes: dict[str, Runtime]) -> Cri:
    """containerd by CRI."""
    found = runtimes["cri"]
    assert isinstance(found, Cri)
    return found


def test_a_pod_can_be_stopped_again_and_again(cri: Cri) -> None:
    with captured_network(cri.node, "bridge"), pod(cri, "twice"):
        for _ in range(3):
            cri.stop("twice")
        assert cri.node.addresses_in_use() == []


def test_containerd_loads_what_was_installed_while_it_runs(cri: Cri) -> None:
    with captured_network(cri.node, "bridge"):
        cri.node.until(lambda: cri.loaded_plugins() == ["bridge", "portmap", "interceptor-cni"], "containerd loads the entry")
    cri.node.until(lambda: "interceptor-cni" not in cri.loaded_plugins(), "containerd forgets the entry")


def test_dns_is_captured_to_the_resolvers_of_the_pod(cri: Cri) -> None:
    """The kubelet's resolvers come by the `dns` capability: at ADD the pod's resolv.conf isn't written yet."""
    with captured_network(cri.node, "bridge", "--capture", json.dumps({"dns": "resolv-conf"})), pod(cri, "dns") as pid:
        found = capture.check(options(dns="resolv-conf"), netns=cri.node.netns_of(pid), resolvers=RESOLVERS)
        assert found.differences == ()
