"""Several workers: they share a port, one that dies is replaced, all end together, and their counters add up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.proxy.pods import (
    APP_PORT,
    DEADLINE_S,
    INBOUND,
    OUTBOUND,
    REDIRECT_RULES,
    TPROXY_RULES,
    V4,
    Pods,
    client,
    listen,
    pods,
    proxy,
)

LISTENERS = [("outbound", "redirect", OUTBOUND, "v4")]
MANY = 40  # that all of them fall to one of two workers has a probability of 2 in 2**40


@pytest.fixture(scope="module")
def world() -> Iterator[Pods]:
    """A pod whose outbound TCP is redirected."""
    with pods("work") as made:
        made.rules(REDIRECT_RULES)
        yield made


def workers_of(pid: int) -> list[int]:
    """The children of a process, by age."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return sorted(int(word) for word in file.read().split())


def wait_until(condition: Callable[[], bool]) -> None:
    """Until `condition` holds, or fail."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def open_pairs(world: Pods, server: socket.socket, port: int, count: int) -> list[tuple[socket.socket, socket.socket]]:
    """`count` connections through the proxy, (client's end, server's end), each known to be relayed."""
    made = []
    for _ in range(count):
        near = client(world.pod, V4["far"], port)
        far, _ = server.accept()
        far.settimeout(DEADLINE_S)
        near.sendall(b"?")
        assert far.recv(1) == b"?"
        made.append((near, far))
    return made


def lives(near: socket.socket, far: socket.socket) -> bool:
    """Whether bytes still pass."""
    try:
        near.sendall(b"!")
        return far.recv(1) == b"!"
    except OSError:
        return False


def close_all(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Both ends of each."""
    for near, far in pairs:
        near.close()
        far.close()


@pytest.mark.netns
def test_workers_share_the_connections_and_their_counters_add_up(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=2) as running:
        assert len(workers_of(running.process.pid)) == 2
        with listen(world.far, V4["far"], 7500) as server:
            close_all(open_pairs(world, server, 7500, MANY))
        wait_until(lambda: len(running.flows) == MANY)
        assert running.stop() == 0
    assert running.counters["connections_opened"] == running.counters["connections_closed"] == MANY
    assert "connections_failed" not in running.counters


@pytest.mark.netns
def test_a_worker_that_is_killed_takes_its_own_connections_only_and_is_replaced(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=2) as running, listen(world.far, V4["far"], 7501) as server:
        pairs = open_pairs(world, server, 7501, MANY)
        before = workers_of(running.process.pid)
        os.kill(before[0], signal.SIGKILL)
        alive = [pair for pair in pairs if lives(*pair)]
        assert 0 < len(alive) < MANY
        wait_until(lambda: len(set(workers_of(running.process.pid)) - {before[0]}) == 2)
        # Also those that fall to the new one.
        more = open_pairs(world, server, 7501, MANY)
        assert all(lives(*pair) for pair in more)
        close_all(pairs)
        close_all(more)
        wait_until(lambda: len(running.flows) == len(alive) + MANY)
        assert running.stop() == 0
    assert running.counters["connections_opened"] == running.counters["connections_closed"] == 2 * MANY
    assert running.counters["connections_failed"] == {"worker_died": MANY - len(alive)}
    assert running.counters["worker_restarts"] == 1


@pytest.mark.netns
def test_workers_share_a_tproxy_port_too() -> None:
    with pods("worktp") as made:
        made.rules(TPROXY_RULES)
        made.policy_routes()
        inbound = [("inbound", "tproxy", INBOUND, "v4")]
        with proxy(made.pod, listeners=inbound, workers=2) as running:
            with listen(made.pod, V4["pod"], APP_PORT) as server:
                for _ in range(MANY):
                    with client(made.far, V4["pod"], APP_PORT) as near, server.accept()[0] as far:
                        far.sendall(b"!")
                        assert near.recv(1) == b"!"
            wait_until(lambda: len(running.flows) == MANY)
        assert {flow["reason"] for flow in running.flows} == {"closed"}


@pytest.mark.netns
def test_sigterm_drains_every_worker(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=2, drain_deadline_s=60) as running:
        with listen(world.far, V4["far"], 7502) as server:
            pairs = open_pairs(world, server, 7502, MANY)
        running.process.send_signal(signal.SIGTERM)
        assert all(lives(*pair) for pair in pairs)
        close_all(pairs)
        assert running.process.wait(DEADLINE_S) == 0


@pytest.mark.netns
def test_a_second_sigterm_ends_every_worker_at_once(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=2, drain_deadline_s=60) as running:
        with listen(world.far, V4["far"], 7503) as server:
            pairs = open_pairs(world, server, 7503, MANY)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_listening(world))
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(DEADLINE_S) == 0
        assert not any(lives(*pair) for pair in pairs)
        close_all(pairs)


@pytest.mark.netns
def test_workers_do_not_outlive_a_supervisor_that_is_killed(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=2) as running:
        orphans = workers_of(running.process.pid)
        running.process.kill()
        wait_until(lambda: not any(is_running(pid) for pid in orphans))


@pytest.mark.netns
@pytest.mark.parametrize("workers", [1, 2])
def test_ports_that_another_proxy_has_are_taken_not_shared(world: Pods, workers: int) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=2):
        second = start_and_fail(world.pod, workers=workers)
    assert second.returncode == 7
    assert "the port is taken" in second.stderr


@pytest.mark.netns
def test_a_worker_that_cannot_begin_ends_all_with_its_reason(world: Pods) -> None:
    failed = start_and_fail(world.pod, "setpriv", "--bounding-set=-all", "--inh-caps=-all", workers=2)
    assert failed.returncode == 7
    assert "needs CAP_SETUID" in failed.stderr


def is_listening(world: Pods) -> bool:
    """Whether anybody takes connections at the outbound port."""
    command = ["ip", "netns", "exec", world.pod, "ss", "-Htln", f"sport = :{OUTBOUND}"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def is_running(pid: int) -> bool:
    """Whether there is such a process, zombies aside."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_and_fail(where: str, *wrapper: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """A proxy that ends by itself."""
    program = [sys.executable, "-m", "tests.proxy.serve", json.dumps({"listeners": LISTENERS, **settings})]
    command = ["ip", "netns", "exec", where, *wrapper, *program]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def admin_answer(world: Pods, path: str, method: str = "GET") -> str:
    """What the admin port says to somebody on the pod's loopback."""
    argv = ["curl", "--silent", "--max-time", "8", "-X", method, f"http://127.0.0.1:15020{path}"]
    return subprocess.run(["ip", "netns", "exec", world.pod, *argv], capture_output=True, text=True, check=True).stdout


@pytest.mark.netns
@pytest.mark.parametrize("workers", [1, 2])
def test_the_admin_port_tells_of_all_workers(world: Pods, workers: int) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=workers, admin_port=15020) as running:
        assert admin_answer(world, "/readyz") == "serving\n"
        with listen(world.far, V4["far"], 7505) as server:
            pairs = open_pairs(world, server, 7505, MANY)
            flows = json.loads(admin_answer(world, "/flows"))["flows"]
            during = admin_answer(world, "/metrics")
            close_all(pairs)
        wait_until(lambda: len(running.flows) == MANY)
        after = admin_answer(world, "/metrics")
    locals_ = {flow["client"] for flow in running.flows}
    assert {flow["client"] for flow in flows} == locals_
    assert {(flow["reason"], flow["original_dst"], flow["bytes_sent"]) for flow in flows} == {("open", f"{V4['far']}:7505", 1)}
    assert f'interceptor_connections_open{{direction="outbound",mode="redirect"}} {MANY}\n' in during
    assert 'interceptor_connections_open{direction="outbound",mode="redirect"} 0\n' in after
    assert f'interceptor_sent_bytes_total{{direction="outbound"}} {MANY}\n' in after
    assert ('interceptor_worker_open_fds{worker="1"}' in during) == (workers == 2)


@pytest.mark.netns
@pytest.mark.parametrize("workers", [1, 2])
def test_drain_over_the_admin_port_ends_the_proxy_when_the_connections_have(world: Pods, workers: int) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=workers, admin_port=15020, drain_deadline_s=60) as running:
        with listen(world.far, V4["far"], 7506) as server:
            pairs = open_pairs(world, server, 7506, 4)
        assert admin_answer(world, "/drain", "POST") == "draining\n"
        wait_until(lambda: admin_answer(world, "/readyz") == "draining\n")
        # A second time is no "now".
        assert admin_answer(world, "/drain", "POST") == "draining\n"
        assert all(lives(*pair) for pair in pairs)
        close_all(pairs)
        assert running.process.wait(DEADLINE_S) == 0


@pytest.mark.netns
def test_the_admin_port_goes_on_when_a_worker_is_replaced_or_does_not_answer(world: Pods) -> None:
    with proxy(world.pod, listeners=LISTENERS, workers=2, admin_port=15020) as running:
        before = workers_of(running.process.pid)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: "interceptor_worker_restarts_total 1\n" in admin_answer(world, "/metrics"))
        wait_until(lambda: len(set(workers_of(running.process.pid)) - {before[0]}) == 2)
        os.kill(before[1], signal.SIGSTOP)
        try:
            assert json.loads(admin_answer(world, "/flows")) == {"flows": [], "more": False}
        finally:
            os.kill(before[1], signal.SIGCONT)
        wait_until(lambda: admin_answer(world, "/readyz") == "serving\n")
