"""How a proxy starts, drains and ends, and what it does when the host runs short."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from interceptor import netns
from interceptor.errors import ProxyError
from interceptor.proxy import acceptor
from interceptor.proxy.flows import Flow
from interceptor.proxy.server import Proxy, open_listeners
from interceptor.proxy.settings import Listener, ProxySettings
from tests.proxy.pods import (
    DEADLINE_S,
    OUTBOUND,
    PROXY_UID,
    REDIRECT_RULES,
    V4,
    Pods,
    client,
    is_reset,
    listen,
    pods,
    proxy,
)
from tests.rig.client import wait_until

pytestmark = pytest.mark.netns
WAITING = 3 * acceptor.ACCEPT_BATCH
LISTENERS = [("outbound", "redirect", OUTBOUND, "v4"), ("outbound", "redirect", OUTBOUND, "v6")]


@pytest.fixture(scope="module")
def world() -> Iterator[Pods]:
    """A pod whose outbound TCP is redirected."""
    with pods("life") as made:
        made.rules(REDIRECT_RULES)
        yield made


def settings(*listeners: Listener, **more: object) -> ProxySettings:
    """The least a proxy needs."""
    return ProxySettings(listeners, frozenset({OUTBOUND}), 15002, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_an_idle_proxy_at_once(world: Pods, number: signal.Signals) -> None:
    with proxy(world.pod, listeners=LISTENERS) as running:
        running.process.send_signal(number)
        assert running.process.wait(DEADLINE_S) == 0


def test_draining_lets_a_flow_finish_and_takes_no_new_one(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS) as running, listen(world.far, V4["far"], 7100) as server:
        near = client(world.pod, V4["far"], 7100)
        accepted, _ = server.accept()
        running.process.send_signal(signal.SIGTERM)
        wait_for_refusal(world)
        near.sendall(b"still here")
        assert accepted.recv(100) == b"still here"
        near.close()
        accepted.close()
        assert running.process.wait(DEADLINE_S) == 0
        assert running.flow(lambda flow: not flow["reason"].startswith("refused"))["reason"] == "closed"


def test_what_outlives_the_drain_deadline_is_reset(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, drain_deadline_s=0.1) as running, listen(world.far, V4["far"], 7101) as server:
        near = client(world.pod, V4["far"], 7101)
        accepted, _ = server.accept()
        running.process.send_signal(signal.SIGTERM)
        with near, accepted:
            for sock in (near, accepted):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
        assert running.flow()["reason"] == "drained"


def test_a_second_signal_ends_the_drain(world: Pods) -> None:
    with (
        proxy(world.pod, listeners=LISTENERS, drain_deadline_s=60) as running,
        listen(world.far, V4["far"], 7102) as server,
        client(world.pod, V4["far"], 7102),
        server.accept()[0],
    ):
        running.process.send_signal(signal.SIGTERM)
        wait_for_refusal(world)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(DEADLINE_S) == 0


def test_an_idle_flow_is_reset_when_it_is_told_so(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, idle_timeout_s=0.1) as running, listen(world.far, V4["far"], 7103) as server:
        with client(world.pod, V4["far"], 7103) as near, server.accept()[0], pytest.raises(ConnectionResetError):
            near.recv(1)
        assert running.flow()["reason"] == "idle_timeout"


@pytest.mark.slow
def test_a_flow_that_lasts_and_is_silent_has_its_peers_asked_whether_they_live(world: Pods) -> None:
    def keepalives() -> int:
        words = [
            "ip",
            "netns",
            "exec",
            world.pod,
            "ss",
            "-Htno",
            "state",
            "established",
            f"( sport = :{OUTBOUND} or dport = :7110 )",
        ]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.count("timer:(keepalive,")

    # A quarter of the idle timeout is how often the proxy looks.
    with (
        proxy(world.pod, listeners=LISTENERS, idle_timeout_s=4.0),
        listen(world.far, V4["far"], 7110) as server,
        client(world.pod, V4["far"], 7110),
        server.accept()[0],
    ):
        deadline = time.monotonic() + DEADLINE_S
        while keepalives() != 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_client_that_gives_up_while_dialling_is_reported(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS) as running:
        near = client(world.pod, "10.77.0.98", 7104)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        near.close()
        assert running.flow()["reason"] == "client_failed"


def test_a_taken_port_names_its_owner(world: Pods) -> None:
    program = f"import socket, sys; s = socket.create_server(('', {OUTBOUND})); print(flush=True); sys.stdin.read()"
    command = ["ip", "netns", "exec", world.pod, sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with netns.entered(f"/run/netns/{world.pod}"), pytest.raises(ProxyError) as caught:
            open_listeners(settings(Listener("outbound", "redirect", OUTBOUND, "v4")))
    assert f"port {OUTBOUND}" in str(caught.value)
    assert f"(pid {holder.pid}, uid 0)" in str(caught.value)


def test_a_missing_capability_is_named(world: Pods) -> None:
    program = (
        "from interceptor.proxy.server import open_listeners\n"
        "from interceptor.proxy.settings import *\n"
        "from interceptor.errors import ProxyError\n"
        "listener = Listener('inbound', 'tproxy', 15006, 'v4')\n"
        "try: open_listeners(ProxySettings((listener,), frozenset(), 1))\n"
        "except ProxyError as error: print(error)\n"
    )
    demoted = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = ["ip", "netns", "exec", world.pod, *demoted, sys.executable, "-c", program]
    assert "CAP_NET_ADMIN" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("mark", "capabilities"), [(None, "0000000000000000"), (7, "0000000000001000")], ids=["nothing to keep", "SO_MARK to keep"]
)
def test_running_as_the_proxy_user_keeps_net_admin_only_when_needed(world: Pods, mark: int | None, capabilities: str) -> None:
    with (
        proxy(world.pod, listeners=LISTENERS, upstream_mark=mark) as running,
        open(f"/proc/{running.process.pid}/status") as file,
    ):
        status = dict(line.split(":\t", 1) for line in file.read().splitlines())
    assert status["Uid"].split() == [str(PROXY_UID)] * 4
    assert status["Groups"].strip() == ""
    assert (status["CapEff"], status["CapPrm"]) == (capabilities, capabilities)


def test_upstreams_are_opened_through_the_seam_alone(world: Pods) -> None:
    """As `interceptor run` does: listeners inside one namespace, the thread outside, upstream sockets in yet another."""
    opened: list[int] = []

    def open_far(family: int, kind: int) -> socket.socket:
        opened.append(family)
        with netns.entered(f"/run/netns/{world.far}"):
            return socket.socket(family, kind)

    flows: list[Flow] = []
    with netns.entered(f"/run/netns/{world.pod}"):
        listeners = open_listeners(settings(Listener("outbound", "redirect", OUTBOUND, "v4")))
    served = Proxy(settings(Listener("outbound", "redirect", OUTBOUND, "v4")), listeners, flows.append, open_far)
    thread = threading.Thread(target=served.run)
    thread.start()
    # 127.1.2.3 outside the pod is the far namespace's own loopback: reached only from a socket there.
    world.rules("insert rule inet px out ip daddr 127.1.2.3 tcp dport 7106 redirect to :15001")
    with listen(world.far, "127.1.2.3", 7106) as server, client(world.pod, "127.1.2.3", 7106) as near:
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"from far")
        assert near.makefile("rb").read() == b"from far"
    served.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert opened == [socket.AF_INET]
    assert flows[0].original_dst == ("127.1.2.3", 7106)


def test_an_upstream_that_greets_and_resets_before_we_look_is_heard_and_ends_in_a_reset(world: Pods) -> None:
    was_reset = threading.Event()

    class ResetMeanwhile(socket.socket):
        def connect_ex(self, to: object) -> int:
            number = super().connect_ex(to)  # type: ignore[arg-type]
            assert was_reset.wait(DEADLINE_S)
            return number

    flows: list[Flow] = []
    with netns.entered(f"/run/netns/{world.pod}"):
        listeners = open_listeners(settings(Listener("outbound", "redirect", OUTBOUND, "v4")))

    def open_far(family: int, kind: int) -> socket.socket:
        with netns.entered(f"/run/netns/{world.far}"):
            return ResetMeanwhile(family, kind)

    served = Proxy(settings(Listener("outbound", "redirect", OUTBOUND, "v4")), listeners, flows.append, open_far)
    thread = threading.Thread(target=served.run)
    thread.start()
    with listen(world.far, V4["far"], 7109) as server, client(world.pod, V4["far"], 7109) as near:
        accepted, _ = server.accept()
        accepted.sendall(b"busy")
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        accepted.close()
        was_reset.set()
        assert near.recv(100) == b"busy"
        with pytest.raises(ConnectionResetError):
            near.recv(1)
    served.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert [flow.reason for flow in flows] == ["upstream_failed"]


def test_a_flow_whose_upstream_lacks_a_descriptor_is_reset(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, spare_descriptors=3) as running, listen(world.far, V4["far"], 7108) as far:
        served = psutil.Process(running.process.pid)
        before = served.num_fds()
        with client(world.pod, V4["far"], 7108), far.accept()[0]:
            assert is_reset(world.pod, V4["far"], 7108)
            running.flow(lambda flow: flow["error"] == "socket: EMFILE")
        wait_until(lambda: served.num_fds() == before, "all descriptors are given back")
        assert converses(world, far)


@pytest.mark.slow
def test_running_out_of_descriptors_pauses_accepting_and_recovers(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, spare_descriptors=2) as running, listen(world.far, V4["far"], 7107) as far:
        with (
            client(world.pod, V4["far"], 7107) as near,
            far.accept()[0] as served,
            client(world.pod, V4["far"], 7107) as waiting,
        ):
            before = cpu_ticks(running.process.pid)
            time.sleep(0.5)
            spent = cpu_ticks(running.process.pid) - before
            waiting.sendall(b"?")
            near.close()
            served.close()
            # A flow that has ended gives two descriptors back.
            with far.accept()[0] as accepted:
                assert accepted.recv(1) == b"?"
        assert running.stop() == 0
    assert running.counters["accept_errors"]["EMFILE"] > 0
    assert running.counters["connections_opened"] == running.counters["connections_closed"]
    assert spent < 0.2 * os.sysconf("SC_CLK_TCK"), "it spun"


def converses(world: Pods, server: socket.socket) -> bool:
    """Whether a fresh connection goes through."""
    with client(world.pod, *server.getsockname()[:2]) as near:
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"!")
        return near.recv(1) == b"!"


def cpu_ticks(pid: int) -> int:
    """User and system time of a process (proc(5), fields 14 and 15)."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_for_refusal(world: Pods) -> None:
    """Until the proxy's port is closed: it drains."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            is_reset(world.pod, "127.0.0.1", OUTBOUND)
        except ConnectionRefusedError:
            return
        time.sleep(0.005)
    raise AssertionError("still listening")


def test_where_the_kernel_does_not_say_who_waits_all_are_accepted(world: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "waiting", lambda _listener: None)
    monkeypatch.setattr(acceptor, "ACCEPT_BATCH", 2)
    given = settings(Listener("outbound", "redirect", OUTBOUND, "v4"))
    with netns.entered(f"/run/netns/{world.pod}"):
        listeners = open_listeners(given)
    flows: list[Flow] = []
    clients = [
        client(world.pod, "127.0.0.1", OUTBOUND) for _ in range(5)
    ]  # refused, once they are accepted: nobody captured them
    served = Proxy(given, listeners, flows.append)
    thread = threading.Thread(target=served.run)
    thread.start()
    for sock in clients:
        with sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
    served.stop()
    thread.join(DEADLINE_S)
    assert [flow.reason for flow in flows] == ["refused_direct_dial"] * 5


def test_who_waits_when_a_drain_begins_is_served_however_many(world: Pods) -> None:
    with (
        proxy(world.pod, listeners=LISTENERS) as running,
        listen(world.far, V4["far"], 7101) as server,
        contextlib.ExitStack() as stack,
    ):
        server.listen(WAITING + 1)
        stack.enter_context(client(world.pod, V4["far"], 7101))  # without an open one there is no drain
        stack.enter_context(server.accept()[0])
        running.process.send_signal(signal.SIGSTOP)
        for _ in range(WAITING):
            stack.enter_context(client(world.pod, V4["far"], 7101))
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGCONT)
        for _ in range(WAITING):
            stack.enter_context(server.accept()[0])
