"""The outbound contracts once more, with capture at connect() in place of rules: the same claims, other means.

What a claim says of interfaces, of what others send or of the kernel's log is not here: connect refuses those options.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interceptor import capture
from interceptor.plan.model import Plan
from tests.netns.test_contract_identity import (
    test_app_to_a_service_that_is_itself,
    test_app_to_its_own_pod_address_is_direct,
    test_app_to_loopback_is_direct,
    test_dialling_a_remote_proxy_port_does_not_loop,
    test_direct_dial_of_the_proxy_is_recognisable,
    test_proxy_inbound_leg_is_direct,
    test_proxy_self_call_respects_inbound_exclusions,
    test_proxy_to_its_own_pod_address_is_inbound,
    test_proxy_to_loopback_is_direct,
    test_proxy_upstream_is_direct,
    test_tunnel_port_is_never_captured_inbound,
)
from tests.netns.test_contract_rules import (
    test_a_blocked_family_keeps_its_exclusions,
    test_excluded_cidr_beats_included_cidr,
    test_excluded_gid_beats_included_uid_and_gid,
    test_excluded_port_beats_included_port,
    test_excluded_uid_beats_included_port_cidr_and_uid,
    test_include_lists_together_mean_and,
    test_many_excluded_outbound_ranges,
    test_many_included_ranges,
    test_the_covered_family_is_captured_beside_a_blocked_one,
    test_the_uncovered_family,
    test_uid_rule_names_protocol_ports_and_uids,
)
from tests.rig.capturing import Capture, options
from tests.rig.connecting import own_bpffs, own_cgroup
from tests.rig.world import World

MECHANISMS = [
    pytest.param({}, id="redirect-in"),
    pytest.param({"inbound": "tproxy"}, id="tproxy-in"),
    pytest.param({"dns": "all", "udp": "tproxy"}, id="dns"),
]


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest) -> dict[str, str]:
    """What else is captured, and how."""
    return dict(request.param)


@pytest.fixture(scope="module")
def backend() -> str:
    """Connect needs rules only for what is inbound: one backend tells as much as four."""
    return "nft"


@pytest.fixture(scope="module")
def cgroup() -> Iterator[str]:
    """The cgroup of this process, which is the application and the proxy in one."""
    with own_bpffs(), own_cgroup() as path:
        yield path


@pytest.fixture(scope="module")
def _captured(w: World, backend: str, cgroup: str) -> Iterator[Capture]:
    held: list[Plan] = []

    def ensure(**texts: str) -> None:
        config = options(**{"backend": backend, "outbound": "connect", "capture_cgroup": cgroup, **texts})
        plan = capture.prepare(config, netns=w.pod.name).plan
        if held != [plan]:
            held.clear()
            capture.enable(config, netns=w.pod.name)
            held.append(plan)

    try:
        yield ensure
    finally:
        capture.disable(netns=w.pod.name)
