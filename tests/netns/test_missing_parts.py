"""What a kernel or namespace lacks is said, with the way out, and nothing is changed.

Kernels that lack modules: vagrant/qemu.
"""

from __future__ import annotations

import pytest

from interceptor.errors import Unsupported
from tests.rig.capturing import capturing, enable
from tests.rig.kernel import snapshot
from tests.rig.net import pods


def test_tproxy_where_ipv6_is_off_on_lo(backend: str) -> None:
    with pods(1) as (pod,):
        for name in ("all", "default", "lo"):
            pod.sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")
        before = snapshot(pod)
        with pytest.raises(Unsupported, match=r"IPv6 is off on lo.*--ip-family v4"):
            enable(pod, backend=backend, inbound="tproxy")
        assert snapshot(pod) == before
        with capturing(pod, backend=backend, inbound="tproxy", ip_family="v4") as report:
            assert report.changed
