"""The proxy in a pod says that it is ready; or somebody else says so."""

from __future__ import annotations

from interceptor.netns import entered
from interceptor.proxy import readiness
from tests.rig.client import PROXY_UID
from tests.rig.net import Pod
from tests.rig.sockets import identity

PORT = 15002  # --probe-port


def announce(
    pod: Pod, uid: int = PROXY_UID, gid: int | None = None, *, mark: int | None = None, own: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Announce in `pod`, as this user; the addresses for which a rule took it. `own`: the pod's addresses beside loopback."""
    with entered(pod.path), identity(uid, uid if gid is None else gid):
        return readiness.announce(readiness.addresses(own), PORT, mark)
