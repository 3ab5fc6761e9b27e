"""`probe` proves each captured path with packets, names the failing rule, and leaves nothing behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from interceptor import capture
from interceptor.probe import probe
from tests.rig.capturing import options
from tests.rig.net import Pod, ip, pods, wire

CONFIGS = [
    pytest.param({}, id="redirect"),
    pytest.param({"outbound": "tproxy", "inbound": "tproxy", "udp": "tproxy", "dns": "all"}, id="tproxy, UDP, DNS"),
    pytest.param({"include_outbound_ports": "8080", "include_inbound_ports": "9000", "include_uids": "70000"}, id="includes"),
]


@pytest.fixture
def pod() -> Iterator[Pod]:
    """A pod with a default route, so that outbound packets have somewhere to go."""
    with pods(2) as (one, other):
        wire(one, other, ("eth0", "eth0"), (["10.9.0.1/24", "fd09::1/64"], ["10.9.0.2/24", "fd09::2/64"]))
        ip("route add default via 10.9.0.2\nroute add default via fd09::2\n", one)
        yield one


@pytest.mark.parametrize("texts", CONFIGS)
def test_every_captured_path_is_proved(pod: Pod, backend: str, texts: dict[str, str]) -> None:
    wanted = options(backend=backend, **texts)
    capture.enable(wanted, netns=pod.name)

    results = probe(wanted, netns_name=pod.name)

    assert [str(result) for result in results if result.status != "ok"] == []
    assert {(result.path.direction, result.path.family.value) for result in results} >= {
        (direction, family) for direction in ("outbound", "inbound", "self-call") for family in ("v4", "v6")
    }


def test_failing_rule_is_named_and_only_its_paths_fail(pod: Pod) -> None:
    wanted = options(backend="nft")
    capture.enable(wanted, netns=pod.name)
    flush = ["ip", "netns", "exec", pod.name, "nft", "flush", "chain", "inet", "interceptor", "nat_to_inbound"]
    subprocess.run(flush, check=True)

    results = probe(wanted, netns_name=pod.name)

    failed = [result for result in results if result.status == "failed"]
    assert {result.path.direction for result in failed} == {"inbound", "self-call"}
    assert all("nat_to_inbound" in result.detail for result in failed)


def test_without_rules_every_path_fails(pod: Pod) -> None:
    results = probe(options(backend="nft"), netns_name=pod.name)

    assert {result.status for result in results} == {"failed"}
    assert all("run `interceptor init`" in result.detail for result in results)


def test_probe_leaves_no_interface_and_no_address(pod: Pod) -> None:
    wanted = options(backend="nft")
    capture.enable(wanted, netns=pod.name)
    show = ["ip", "-n", pod.name, "addr"]
    before = subprocess.run(show, capture_output=True, text=True, check=True).stdout

    probe(wanted, netns_name=pod.name)

    assert subprocess.run(show, capture_output=True, text=True, check=True).stdout == before
