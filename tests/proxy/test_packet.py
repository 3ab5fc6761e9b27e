"""The packet relay: one TCP connection from end to end, and nothing of it left behind."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from interceptor import capture, netns
from interceptor.bpf import links
from interceptor.config import Config
from interceptor.proxy.relay import packet
from interceptor.sockets import reset_on_close
from tests.proxy.conversations import converse, read_all, read_exactly
from tests.proxy.packet_world import entries, out_of_order, rough, tracked, until
from tests.proxy.pods import DEADLINE_S, INBOUND, OUTBOUND, V4, V6, Pods, ProxyProcess, client, listen, pods, proxy, run

pytestmark = pytest.mark.netns
PORT = 7400
NETS = {"v4": V4, "v6": V6}
FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])
RST, ACK = 4, 16
COUNT = 120
REPEATED = 60
TORTURE_COUNT = 10_000
ROUGH_COUNT = 2_000


@contextmanager
def splicing(
    world: Pods, family: str, direction: str = "outbound", mechanism: str = "redirect", **more: Any
) -> Iterator[ProxyProcess]:
    """A packet proxy, with what it captures."""
    port = OUTBOUND if direction == "outbound" else INBOUND
    modes = {"outbound": "off", "inbound": "off", direction: mechanism}
    capture.enable(Config(backend="nft", **modes), netns=world.pod)  # type: ignore[arg-type]
    with proxy(world.pod, listeners=[(direction, mechanism, port, family)], relay="packet", **more) as running:
        yield running


@pytest.fixture(scope="module")
def world() -> Iterator[Pods]:
    """A pod and everybody else."""
    with pods("packet") as made:
        yield made


@contextmanager
def connected(world: Pods, family: str = "v4") -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one connection: the application's, the server's."""
    ip = NETS[family]["far"]
    with listen(world.far, ip, PORT) as server, client(world.pod, ip, PORT) as near:
        far, _ = server.accept()
        far.settimeout(DEADLINE_S)
        with far:
            yield near, far


def relays(running: ProxyProcess) -> set[str]:
    """Which relays the flows that have ended had."""
    return {flow["relay"] for flow in running.flows}


def converse_through(world: Pods, running: ProxyProcess, family: str, direction: str, count: int) -> None:
    ends = (world.pod, world.far, "far") if direction == "outbound" else (world.far, world.pod, "pod")
    assert converse(ends[0], ends[1], NETS[family][ends[2]], PORT, count) == []
    until(lambda: len(running.flows) == count, lambda: len(running.flows))


@FAMILIES
@pytest.mark.parametrize("mechanism", ["redirect", "tproxy"])
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_every_way_of_capture_is_spliced_and_leaves_nothing(world: Pods, direction: str, mechanism: str, family: str) -> None:
    with splicing(world, family, direction, mechanism) as running:
        converse_through(world, running, family, direction, COUNT)
        pid = running.process.pid
        until(lambda: not any(entries(pid).values()), lambda: entries(pid))
        assert tracked(world.pod, PORT) == []
    assert relays(running) == {"packet"}
    assert running.counters["connections_opened"] == running.counters["connections_closed"]


@pytest.mark.torture
@FAMILIES
@pytest.mark.parametrize("mechanism", ["redirect", "tproxy"])
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_thousands_of_conversations(world: Pods, direction: str, mechanism: str, family: str) -> None:
    with splicing(world, family, direction, mechanism) as running:
        converse_through(world, running, family, direction, TORTURE_COUNT)
        pid = running.process.pid
        until(lambda: not any(entries(pid).values()), lambda: entries(pid))
        assert tracked(world.pod, PORT) == []
    assert relays(running) == {"packet"}


def test_several_workers_share_the_programs(world: Pods) -> None:
    with splicing(world, "v4", workers=3) as running:
        converse_through(world, running, "v4", "outbound", COUNT)
    assert relays(running) == {"packet"}
    assert running.counters["connections_opened"] == COUNT


def test_bytes_and_duration_are_exact(world: Pods) -> None:
    with splicing(world, "v4") as running:
        with connected(world) as (near, far):
            near.sendall(b"x" * 300_001)
            near.shutdown(socket.SHUT_WR)
            assert len(read_all(far)) == 300_001
            far.sendall(b"y" * 70_003)
            far.close()
            assert len(read_all(near)) == 70_003
        flow = running.flow()
    assert (flow["bytes_sent"], flow["bytes_received"], flow["reason"]) == (300_001, 70_003, "closed")
    assert flow["duration_ms"] < 400  # LINGER_S is not part of it


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_is_a_reset_and_says_who(world: Pods, who: str) -> None:
    with splicing(world, "v4") as running:
        with connected(world) as (near, far):
            near.sendall(b"abc")
            assert far.recv(3) == b"abc"
            breaking, broken = (near, far) if who == "client" else (far, near)
            reset_on_close(breaking)
            breaking.close()
            with pytest.raises(ConnectionResetError):
                broken.recv(1)
        flow = running.flow()
    assert (flow["reason"], flow["error"], flow["bytes_sent"]) == (
        "client_failed" if who == "client" else "upstream_failed",
        "ECONNRESET",
        3,
    )


def test_an_idle_flow_is_reset_at_both_ends(world: Pods) -> None:
    with splicing(world, "v4", idle_timeout_s=0.4) as running:
        with connected(world) as (near, far):
            near.sendall(b"abc")
            assert far.recv(3) == b"abc"
            far.sendall(b"defgh")
            assert near.recv(5) == b"defgh"
            for sock in (near, far):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
        flow = running.flow()
        until(lambda: not any(entries(running.process.pid).values()), lambda: entries(running.process.pid))
    assert (flow["reason"], flow["bytes_sent"], flow["bytes_received"]) == ("idle_timeout", 3, 5)


def test_what_drains_too_long_is_reset_at_both_ends(world: Pods) -> None:
    with splicing(world, "v4", drain_deadline_s=0.2) as running, connected(world) as (near, far):
        near.sendall(b"abc")
        assert far.recv(3) == b"abc"
        running.stop()
        for sock in (near, far):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    assert [flow["reason"] for flow in running.flows] == ["drained"]


def test_a_server_that_refuses_is_a_reset(world: Pods) -> None:
    with splicing(world, "v4") as running:
        near = client(world.pod, V4["far"], 7999)
        with pytest.raises(ConnectionResetError), near:
            near.recv(1)
        flow = running.flow()
        assert entries(running.process.pid)["flows"] == 0
    assert flow["reason"] == "connect_failed"


def test_a_server_that_takes_small_segments_alone_is_relayed(world: Pods) -> None:
    run("ip", "-n", world.far, "route", "add", V4["pod"], "dev", "eth0", "advmss", "900")
    try:
        with splicing(world, "v4") as running:
            converse_through(world, running, "v4", "outbound", 20)
    finally:
        run("ip", "-n", world.far, "route", "del", V4["pod"])
    assert running.counters["relay_fallbacks"] == {"mss": 20}


def test_a_client_that_takes_small_segments_gets_small_segments(world: Pods) -> None:
    run("ip", "-n", world.far, "route", "add", V4["pod"], "dev", "eth0", "advmss", "900")
    try:
        with splicing(world, "v4", "inbound") as running:
            converse_through(world, running, "v4", "inbound", 40)
    finally:
        run("ip", "-n", world.far, "route", "del", V4["pod"])
    assert relays(running) == {"packet"}


def test_congestion_notification_on_one_leg_alone_is_relayed(world: Pods) -> None:
    run("ip", "netns", "exec", world.far, "sysctl", "-w", "net.ipv4.tcp_ecn=1")
    try:
        with splicing(world, "v4", "inbound") as running:
            converse_through(world, running, "v4", "inbound", 20)
    finally:
        run("ip", "netns", "exec", world.far, "sysctl", "-w", "net.ipv4.tcp_ecn=2")
    assert running.counters["relay_fallbacks"] == {"ecn": 20}


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[str]:
    """A BPF file system that outlives the proxy: `ip netns exec` has mounts of its own."""
    links.mount_bpffs(str(tmp_path / "bpf"))
    try:
        yield str(tmp_path / "bpf")
    finally:
        subprocess.run(["umount", str(tmp_path / "bpf")], check=True)


def say(sender: socket.socket, receiver: socket.socket, said: bytes) -> None:
    """What one end says, the other hears."""
    sender.sendall(said)
    assert read_exactly(receiver, len(said)) == said


@FAMILIES
@pytest.mark.parametrize("how", ["killed", "drained"])
def test_a_flow_outlives_its_proxy_and_is_the_next_one_s(world: Pods, bpffs: str, how: str, family: str) -> None:
    ip = NETS[family]["far"]
    with listen(world.far, ip, PORT) as server:
        with splicing(world, family, packet_pins=bpffs, drain_deadline_s=0.1) as first:
            near = client(world.pod, ip, PORT)
            far, _ = server.accept()
            far.settimeout(DEADLINE_S)
            say(near, far, b"x" * 100_000)
            first.process.kill() if how == "killed" else first.stop()
            first.process.wait()
        say(far, near, b"y" * 300_000)
        with splicing(world, family, packet_pins=bpffs) as second:
            say(near, far, b"z" * 100_000)
            for sock in (near, far):
                sock.close()
            flow = second.flow(lambda flow: flow["original_dst"].endswith(f":{PORT}"))
            until(lambda: not any(entries(second.process.pid).values()), lambda: entries(second.process.pid))
            assert tracked(world.pod, PORT) == []
    assert (flow["bytes_sent"], flow["bytes_received"], flow["reason"]) == (200_000, 300_000, "closed")
    assert second.counters["connections_adopted"] == 1


def test_a_flow_outlives_its_worker(world: Pods) -> None:
    with splicing(world, "v4", workers=2) as running, connected(world) as (near, far):
        say(near, far, b"before")
        for pid in children(running.process.pid):
            os.kill(pid, signal.SIGKILL)
        say(far, near, b"after")
        until(lambda: len(children(running.process.pid)) == 2, lambda: children(running.process.pid))
        near.close()
        far.close()
        flow = running.flow()
    assert (flow["bytes_sent"], flow["bytes_received"], flow["reason"]) == (6, 5, "closed")


def children(pid: int) -> list[int]:
    """The worker processes of a supervisor."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def converse_through_rough_network(world: Pods, direction: str, family: str, count: int) -> None:
    # A lost RST is never sent again, by anybody: those conversations end by their deadline, with or without a proxy.
    with splicing(world, family, direction) as running, rough(world.pod, "eth0"), rough(world.far, "eth0"):
        before = {where: out_of_order(where) for where in (world.pod, world.far)}
        ends = (world.pod, world.far, "far") if direction == "outbound" else (world.far, world.pod, "pod")
        failures = converse(ends[0], ends[1], NETS[family][ends[2]], PORT, count, without_resets=True)
        assert failures == []
        assert all(out_of_order(where) > before[where] for where in before)
        until(lambda: len(running.flows) == count, lambda: len(running.flows))
        until(lambda: not any(entries(running.process.pid).values()), lambda: entries(running.process.pid))
    assert relays(running) == {"packet"}


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_packets_lost_late_and_doubled_do_no_harm(world: Pods, direction: str, family: str) -> None:
    converse_through_rough_network(world, direction, family, COUNT)


@pytest.mark.torture
@FAMILIES
@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_thousands_of_conversations_over_a_rough_network(world: Pods, direction: str, family: str) -> None:
    converse_through_rough_network(world, direction, family, ROUGH_COUNT)


def test_a_server_that_does_not_read_stops_its_client(world: Pods) -> None:
    with splicing(world, "v4"), connected(world) as (near, _far):
        near.settimeout(0.3)
        pushed = 0
        with suppress(TimeoutError):
            while pushed < 64 << 20:
                pushed += near.send(bytes(1 << 16))
        assert pushed < 16 << 20  # two sockets' buffers, as without a proxy


def test_the_probe_is_answered_by_a_proxy_that_holds_its_clients(world: Pods) -> None:
    with splicing(world, "v4"), client(world.pod, V4["far"], 15002) as near:
        near.sendall(b"?")
        near.shutdown(socket.SHUT_WR)
        assert read_all(near)


def checksummed(source: str, destination: str, segment: bytes) -> bytes:
    """A TCP segment with its checksum (RFC 9293 3.1), which is at offset 16."""
    pseudo = socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(segment))
    total = sum(struct.unpack(f"!{(len(pseudo) + len(segment)) // 2}H", pseudo + segment))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return segment[:16] + struct.pack("!H", ~total & 0xFFFF) + segment[18:]


@contextmanager
def forging(world: Pods, victim: tuple[str, int]) -> Iterator[Callable[[int], None]]:
    """Send bare segments to `victim` in the name of the server, with such flags and numbers that nobody believes."""
    server = V4["far"]
    with netns.entered(f"/run/netns/{world.far}"):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)

    def send(flags: int) -> None:
        segment = struct.pack("!HHIIBBHHH", PORT, victim[1], 1, 1, 5 << 4, flags, 1000, 0, 0)
        raw.sendto(checksummed(server, victim[0], segment), (victim[0], 0))

    with raw:
        yield send


def test_a_forged_reset_ends_nothing(world: Pods) -> None:
    with splicing(world, "v4") as running:
        with connected(world) as (near, far), forging(world, far.getpeername()) as send:
            near.sendall(b"abc")
            assert read_exactly(far, 3) == b"abc"
            send(RST)
            deadline = time.monotonic() + 2 * packet.RESET_LINGER_S
            while time.monotonic() < deadline:
                far.sendall(b"x")
                assert near.recv(1) == b"x"
                time.sleep(0.01)
            assert running.flows == []
        flow = running.flow()
    assert flow["reason"] == "closed"


def test_packets_of_the_other_end_do_not_revive_a_flow_that_was_reset(world: Pods) -> None:
    with splicing(world, "v4") as running, connected(world) as (near, far), forging(world, far.getpeername()) as send:
        near.sendall(b"abc")
        assert read_exactly(far, 3) == b"abc"
        reset_on_close(near)
        near.close()
        deadline = time.monotonic() + 5 * packet.RESET_LINGER_S
        while not running.flows and time.monotonic() < deadline:
            send(ACK)  # as if it had been on its way for long: the client's kernel answers each with a RST
            time.sleep(0.01)
        assert [flow["reason"] for flow in running.flows] == ["client_failed"]


def test_clients_that_reset_at_once_leave_nothing(world: Pods) -> None:
    with splicing(world, "v4") as running, listen(world.far, V4["far"], PORT):
        for _ in range(REPEATED):
            near = client(world.pod, V4["far"], PORT)
            reset_on_close(near)
            near.close()
        pid = running.process.pid
        until(lambda: not any(entries(pid).values()), lambda: entries(pid))


def test_a_client_that_resets_before_the_server_answers_takes_it_with_it(world: Pods) -> None:
    ip = V4["far"]
    with splicing(world, "v4") as running, listen(world.far, ip, PORT) as server:
        server.listen(0)
        fillers = [client(world.far, ip, PORT)]  # one has room; whoever comes next is not answered
        near = client(world.pod, ip, PORT)
        pid = running.process.pid
        until(lambda: entries(pid)["flows"] == 1, lambda: entries(pid))
        os.kill(pid, signal.SIGSTOP)  # or it would hear of the RST before the server is asked again, after a second
        reset_on_close(near)
        near.close()
        fillers.append(server.accept()[0])
        answered, _ = server.accept()
        answered.settimeout(DEADLINE_S)
        os.kill(pid, signal.SIGCONT)
        with answered, pytest.raises(ConnectionResetError):
            answered.recv(1)
        until(lambda: not any(entries(pid).values()), lambda: entries(pid))
        flow = running.flow()
    for sock in fillers:
        sock.close()
    assert (flow["reason"], flow["error"]) == ("client_failed", "ECONNRESET")
