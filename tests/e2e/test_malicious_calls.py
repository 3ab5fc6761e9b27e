"""Calls that mean to make the proxy call itself. Each is answered as a stranger would be, or broken off; none goes round.

The first 35 rows are those of ztunnel's malicious_calls_inpod: 21 from a captured client, 14 from one that is not. There the
expectation is that the request fails; here it is how. Two ports are ours, and so is a second captured pod.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.e2e.test_proxy import interceptor
from tests.rig.client import APP_UID, Answer, ask
from tests.rig.connecting import own_bpffs, own_cgroup
from tests.rig.crashing import BPFFS
from tests.rig.net import Pod, ip, pods, wire
from tests.rig.servers import Server, serving
from tests.rig.sockets import open_socket, split

pytestmark = [pytest.mark.netns, pytest.mark.default_relay]
DEADLINE_S = 10.0
ADMIN = 15020
# outbound, inbound, tunnel; socks and admin of ztunnel's (nobody's here); metrics; readiness of ztunnel's; DNS, probe
PORTS = (15001, 15006, 15008, 15080, 15000, ADMIN, 15021, 15053, 15002)
# The caller -> who is called -> what becomes of it, port by port. refused: by the kernel, as nobody listens. reset: taken and
# broken off. 403: the admin port, which tells strangers no flows.
EXPECTED = {
    "captured": {
        # Through the caller's own proxy, which takes everything and resets what it cannot have.
        "bare": ("reset", "reset", "reset", "reset", "reset", "403", "reset", "reset", "answered"),
        "captured": ("reset", "reset", "refused", "refused", "refused", "403", "refused", "refused", "refused"),
        "localhost": ("reset", "reset", "refused", "refused", "refused", "200", "refused", "refused", "refused"),
        "neighbour": ("reset", "reset", "reset", "reset", "reset", "403", "reset", "reset", "answered"),
    },
    "stranger": {
        "bare": ("reset", "reset", "refused", "refused", "refused", "403", "refused", "refused", "refused"),
        # Captured inbound, but for tunnel, admin and probe.
        "captured": ("reset", "reset", "refused", "reset", "reset", "403", "reset", "reset", "refused"),
    },
}
ROWS = [
    pytest.param(caller, called, port, expected, id=f"{caller} to {called} {port}")
    for caller, calls in EXPECTED.items()
    for called, answers in calls.items()
    for port, expected in zip(PORTS, answers, strict=True)
]
ADDRESSES = {
    "v4": {
        "captured": "10.31.0.1",
        "stranger": "10.31.0.2",
        "bare": "10.31.0.3",
        "neighbour": "10.31.0.4",
        "localhost": "127.0.0.1",
    },
    "v6": {"captured": "fd31::1", "stranger": "fd31::2", "bare": "fd31::3", "neighbour": "fd31::4", "localhost": "::1"},
}


@dataclass(frozen=True, slots=True)
class Town:
    """Four pods on one bridge: two are captured, each with a proxy; `bare` has a proxy and no rules; `stranger` has nothing."""

    pods: dict[str, Pod]

    def connections(self) -> int:
        """How many connections the proxies have had, forwarded and refused."""
        return sum(_connections(self.pods[name]) for name in ("captured", "neighbour", "bare"))


@pytest.fixture(scope="module", params=["redirect", "tproxy", "connect"])
def town(request: pytest.FixtureRequest) -> Iterator[Town]:
    names = ("captured", "stranger", "bare", "neighbour")
    with pods(5) as (bridge, *rest), serving() as servers, ExitStack() as running:
        options = running.enter_context(capturing(request.param))
        made = dict(zip(names, rest, strict=True))
        ip("link add br0 type bridge\nlink set br0 up\n", bridge)
        for number, (name, pod) in enumerate(made.items()):
            own = [f"{ADDRESSES['v4'][name]}/24", f"{ADDRESSES['v6'][name]}/64"]
            wire(pod, bridge, ("eth0", f"port{number}"), (own, []))
            ip(f"link set port{number} master br0\n", bridge)
        for name in ("captured", "neighbour"):
            subprocess.run(here("init", "--netns", made[name].name, *options), check=True, capture_output=True)
            running.callback(subprocess.run, here("clean", "--netns", made[name].name), check=True, capture_output=True)
        for name in ("captured", "neighbour", "bare"):
            running.enter_context(proxied(made[name], options if name != "bare" else []))
        servers.listen(Server("stranger", made["stranger"], uid=0), 80)
        yield Town(made)


@contextmanager
def capturing(mechanism: str) -> Iterator[list[str]]:
    """The options that capture by `mechanism`; whose connections connect() captures is this process's cgroup."""
    if mechanism != "connect":
        yield ["--outbound", mechanism, "--inbound", mechanism]
        return
    with own_bpffs(), own_cgroup() as cgroup:
        yield ["--outbound", mechanism, "--capture-cgroup", cgroup, "--inbound", "redirect"]


def here(verb: str, *arguments: str) -> list[str]:
    """What runs a verb, where /sys/fs/bpf is the test's own if it has one."""
    if BPFFS not in os.environ:
        return interceptor(verb, *arguments)
    own = f'mount --bind {os.environ[BPFFS]} /sys/fs/bpf && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", own, "sh", *interceptor(verb, *arguments)]


@contextmanager
def proxied(pod: Pod, options: list[str]) -> Iterator[None]:
    """A proxy in `pod`, that must not have failed."""
    argv = here("proxy", "--netns", pod.name, *options)
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as proxy:
        assert proxy.stderr is not None
        assert "listening" in proxy.stderr.readline()
        try:
            yield
        finally:
            proxy.terminate()
            _, stderr = proxy.communicate(timeout=20)
    assert proxy.returncode == 0, stderr


def called(pod: Pod, to: str, path: str = "/flows") -> tuple[str, str]:
    """What becomes of an HTTP request: refused, reset, closed, answered (not in HTTP) or the status; and the body."""
    with open_socket(pod, socket.SOCK_STREAM, to, uid=APP_UID, gid=APP_UID) as sock:
        sock.settimeout(DEADLINE_S)
        try:
            sock.connect(split(to))
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            with sock.makefile("rb") as file:
                answer = file.read().decode()
        except ConnectionRefusedError:
            return "refused", ""
        except (ConnectionResetError, BrokenPipeError):
            return "reset", ""
    status = re.match(r"HTTP/1\.1 (\d+)", answer)
    return status[1] if status else "answered" if answer else "closed", answer.partition("\r\n\r\n")[2]


def _connections(pod: Pod) -> int:
    status, body = called(pod, at("127.0.0.1", ADMIN), "/metrics")
    assert status == "200", body
    counted = re.findall(r"^interceptor_connections_(?:opened|refused)_total\{.*\} (\d+)$", body, re.MULTILINE)
    return sum(int(count) for count in counted)


def at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@pytest.mark.parametrize("family", ADDRESSES)
@pytest.mark.parametrize(("caller", "who", "port", "expected"), ROWS)
def test_no_call_goes_round(town: Town, family: str, caller: str, who: str, port: int, expected: str) -> None:
    before = town.connections()

    found, _ = called(town.pods[caller], at(ADDRESSES[family][who], port))

    assert found == expected
    # One for each proxy on the way, and whoever breaks it off has counted it.
    assert (expected == "reset") <= town.connections() - before <= 2


@pytest.mark.parametrize("family", ADDRESSES)
def test_after_all_that_honest_calls_are_forwarded(town: Town, family: str) -> None:
    to = at(ADDRESSES[family]["stranger"], 80)

    assert ask(town.pods["captured"], to) == Answer("stranger", to)
