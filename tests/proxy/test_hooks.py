"""The hooks: what other modules may see of a connection, refuse, and put in front of its bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from interceptor import netns
from interceptor.proxy.flows import Flow
from interceptor.proxy.hooks import Hooks
from interceptor.proxy.relay import packet_attach
from interceptor.proxy.relay.packet_table import FlowTable
from interceptor.proxy.server import Proxy, open_listeners
from interceptor.proxy.settings import Listener, ProxySettings, RelayName
from interceptor.sockets import SockAddr
from tests.proxy.pods import DEADLINE_S, OUTBOUND, REDIRECT_RULES, V4, Pods, client, is_reset, listen, pods

pytestmark = pytest.mark.netns
RELAYS = pytest.mark.parametrize("relay", ["packet", "splice", "copy"])


@pytest.fixture(scope="module")
def world() -> Iterator[Pods]:
    """A pod whose outbound TCP is redirected, what this process sends as the proxy included in the exceptions by its mark."""
    with pods("hook") as made:
        made.rules(REDIRECT_RULES)
        made.rules("insert rule inet px out meta mark 7 return")
        yield made


@contextmanager
def hooked(world: Pods, relay: RelayName = "splice", **hooks: Callable[..., object]) -> Iterator[list[Flow]]:
    """A proxy with these hooks, in a thread; its flows, complete after the block."""
    listener = Listener("outbound", "redirect", OUTBOUND, "v4")
    settings = ProxySettings((listener,), frozenset({OUTBOUND}), 15002, upstream_mark=7, relay=relay)
    flows: list[Flow] = []
    with netns.entered(f"/run/netns/{world.pod}"):
        table = FlowTable(packet_attach.attach(), 0) if relay == "packet" else None
        proxy = Proxy(settings, open_listeners(settings), flows.append, flow_table=table)
    for name, hook in hooks.items():
        assert name in Hooks.__slots__  # type: ignore[attr-defined]
        setattr(proxy.hooks, name, hook)

    def serve() -> None:
        with netns.entered(f"/run/netns/{world.pod}"):
            proxy.run()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield flows
    finally:
        proxy.stop()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def test_a_connection_that_is_not_admitted_is_reset_before_anything_is_dialled(world: Pods) -> None:
    asked: list[tuple[SockAddr, SockAddr]] = []

    def admit(_listener: Listener, near: SockAddr, to: SockAddr) -> str:
        asked.append((near, to))
        return "too_many"

    with hooked(world, admit=admit) as flows, listen(world.far, V4["far"], 7600) as server:
        assert is_reset(world.pod, V4["far"], 7600)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [to for _, to in asked] == [(V4["far"], 7600)]
    assert [flow.reason for flow in flows] == ["refused_too_many"]


@RELAYS
def test_the_preface_arrives_before_the_client_s_bytes_and_the_hooks_are_called_in_order(world: Pods, relay: RelayName) -> None:
    called: list[str] = []
    hooks = {
        "preface": lambda connection: f"from {connection.client_address[0]} ".encode(),
        "opened": lambda _connection: called.append("opened"),
        "ended": lambda _connection: called.append("ended"),
    }
    with (
        hooked(world, relay, **hooks) as flows,
        listen(world.far, V4["far"], 7601) as server,
        client(world.pod, V4["far"], 7601) as near,
    ):
        near.sendall(b"hello")
        near.shutdown(1)
        far, _ = server.accept()
        with far:
            assert far.makefile("rb").read() == f"from {V4['pod']} hello".encode()
        assert near.recv(1) == b""
    assert called == ["opened", "ended"]
    # Whose bytes differ at the two ends cannot be one connection.
    assert [(flow.reason, flow.relay) for flow in flows] == [("closed", "splice" if relay == "packet" else relay)]


@RELAYS
def test_what_the_client_says_first_is_shown_until_it_is_enough_and_arrives_whole(world: Pods, relay: RelayName) -> None:
    heard: list[bytes] = []

    def hear(_connection: object, said: bytes) -> bool:
        heard.append(said)
        return said.endswith(b"\n")

    with (
        hooked(world, relay, hear=hear),
        listen(world.far, V4["far"], 7602) as server,
        client(world.pod, V4["far"], 7602) as near,
    ):
        near.sendall(b"GET ")
        near.sendall(b"/\n")
        far, _ = server.accept()
        with far:
            far.settimeout(DEADLINE_S)
            assert far.recv(100) == b"GET /\n"
    assert heard[-1] == b"GET /\n"


@RELAYS
def test_a_client_that_waits_for_the_server_s_greeting_gets_it(world: Pods, relay: RelayName) -> None:
    with (
        hooked(world, relay, hear=lambda _connection, _said: False),
        listen(world.far, V4["far"], 7603) as server,
        client(world.pod, V4["far"], 7603) as near,
    ):
        far, _ = server.accept()
        far.sendall(b"220 ready")
        assert near.recv(100) == b"220 ready"
        near.sendall(b"EHLO")
        far.settimeout(DEADLINE_S)
        assert far.recv(100) == b"EHLO"
        far.close()


def test_a_client_that_gives_up_before_it_spoke_is_reported(world: Pods) -> None:
    with hooked(world, hear=lambda _connection, _said: False) as flows:
        near = client(world.pod, V4["far"], 7604)
        near.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: close() sends RST
        near.close()
        wait_for(flows)
    assert [flow.reason for flow in flows] in (["client_failed"], ["connect_failed"])


def wait_for(flows: list[Flow]) -> None:
    """Until there is one."""
    over = threading.Event()
    for _ in range(1000):
        if flows:
            return
        over.wait(0.01)
    raise AssertionError("no flow")
