"""No application goes around the proxy by the state of another connection: capture at connect() looks at none.

Apart from the other contracts, since these bind ports that earlier connections may still hold.
"""

from __future__ import annotations

from tests.netns.test_contract_bypass import (
    TRIES,
    reuse_ports,
    test_another_users_reset_connection_is_no_way_around,
    test_the_proxy_is_not_captured_by_an_applications_connection,
)
from tests.netns.test_contract_connect import _captured, backend, cgroup
from tests.rig.capturing import Capture
from tests.rig.client import PROXY_UID, Answer
from tests.rig.world import RESETTING, Net, World


def test_the_proxys_reset_connection_is_no_way_around(w: World, net: Net, enabled: Capture) -> None:
    enabled()
    assert reuse_ports(w, net, PROXY_UID) == [Answer("outbound", net.at("server", RESETTING))] * TRIES
