"""No application goes around the proxy by the state of another connection.

A server resets a connection that was let through; within conntrack's 10 s an application connects to it from the same port.
"""

from __future__ import annotations

import itertools

import pytest

from interceptor import capture
from interceptor.backends import cttimeout
from interceptor.netns import entered
from tests.rig.capturing import Capture, enable, options
from tests.rig.client import APP_UID, PROXY_UID, Answer, ask
from tests.rig.foreign import add_mesh_rules, remove_mesh_rules
from tests.rig.kernel import forget_connections
from tests.rig.world import RESETTING, Net, World

TRIES = 20
LET_THROUGH = 2000
# Below the ports that the kernel gives to sockets without one (ip_local_port_range): those may be taken.
ports = itertools.count(21000)


def reuse_ports(w: World, net: Net, first_uid: int) -> list[Answer]:
    """Who answers an application each time that it takes the port of a connection of `first_uid` that was just reset."""
    answers = []
    for port in itertools.islice(ports, TRIES):
        source = net.at("pod", port)
        assert ask(w.pod, net.at("server", RESETTING), uid=first_uid, source=source) == Answer("reset")
        answers.append(ask(w.pod, net.at("server", RESETTING), uid=APP_UID, source=source))
    return answers


def test_mesh_rules_let_applications_around_the_proxy(w: World, net: Net, backend: str) -> None:
    add_mesh_rules(w.pod, backend, PROXY_UID)
    try:
        assert ask(w.pod, net.at("server")) == Answer("outbound", net.at("server"))
        assert reuse_ports(w, net, PROXY_UID) == [Answer("reset")] * TRIES
    finally:
        remove_mesh_rules(w.pod, backend)
        forget_connections(w.pod)


@pytest.mark.parametrize("mechanism", ["redirect", "tproxy"])
def test_the_proxys_reset_connection_is_no_way_around(mechanism: str, w: World, net: Net, enabled: Capture) -> None:
    enabled(outbound=mechanism)
    assert reuse_ports(w, net, PROXY_UID) == [Answer("outbound", net.at("server", RESETTING))] * TRIES


@pytest.mark.parametrize(
    "texts",
    [
        {"exclude_uids": str(LET_THROUGH)},
        {"exclude_gids": str(LET_THROUGH)},
        {"include_uids": str(APP_UID)},
        {"include_gids": str(APP_UID)},
        {"include_uids": str(APP_UID), "include_gids": f"{APP_UID},{LET_THROUGH}"},
        {"exclude_outbound_for_uids": f"tcp:{RESETTING}:{LET_THROUGH}"},
    ],
    ids=lambda texts: "+".join(texts),
)
def test_another_users_reset_connection_is_no_way_around(texts: dict[str, str], w: World, net: Net, enabled: Capture) -> None:
    enabled(**texts)
    assert reuse_ports(w, net, LET_THROUGH) == [Answer("outbound", net.at("server", RESETTING))] * TRIES


def test_policies_that_somebody_deleted_are_made_anew(w: World, net: Net, backend: str, enabled: Capture) -> None:
    enabled()
    # Most kernels keep those that rules name; 6.12.117 does not, and the rules do nothing from then on.
    with entered(w.pod.path):
        are_gone = cttimeout.remove(cttimeout.every())
    assert bool(capture.check(options(backend=backend), netns=w.pod.name).differences) == are_gone
    enable(w.pod, backend=backend)
    assert capture.check(options(backend=backend), netns=w.pod.name).differences == ()
    assert reuse_ports(w, net, PROXY_UID) == [Answer("outbound", net.at("server", RESETTING))] * TRIES


def test_the_proxy_is_not_captured_by_an_applications_connection(w: World, net: Net, enabled: Capture) -> None:
    enabled()
    to = net.at("server")
    for port in itertools.islice(ports, TRIES):
        source = net.at("pod", port)
        assert ask(w.pod, to, uid=APP_UID, source=source) == Answer("outbound", to)
        assert ask(w.pod, net.at("other"), uid=PROXY_UID, source=source) == Answer("far", net.at("other"))
