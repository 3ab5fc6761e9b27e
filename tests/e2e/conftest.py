"""The machine that `interceptor run` is tried on (machine.py), built once a module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import place as places
from tests.e2e.machine import HOST_V4, HOST_V6, WORLD_V4, WORLD_V6, Machine, sh


@pytest.fixture(autouse=True)
def _quick_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes nearly a second to verify the programs of packet splice, which most of these tests are not about."""
    if request.node.get_closest_marker("default_relay") is None:
        monkeypatch.setenv("INTERCEPTOR_RELAY", "splice")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    directory = tmp_path_factory.mktemp("machine")
    host, world = f"itc-e2e-{os.getpid()}-h", f"itc-e2e-{os.getpid()}-w"
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for netns in (host, world):
            sh("ip", "netns", "add", netns)
            # The host's own resolv.conf may name anything: this one names the server in the world.
            Path(f"/etc/netns/{netns}").mkdir(parents=True)
            Path(f"/etc/netns/{netns}/resolv.conf").write_text(f"nameserver {WORLD_V4}\noptions timeout:2 attempts:1\n")
        sh("ip", "link", "add", "veth0", "netns", host, "type", "veth", "peer", "name", "veth0", "netns", world)
        for netns, v4, v6 in ((host, HOST_V4, HOST_V6), (world, WORLD_V4, WORLD_V6)):
            lines = ("link set lo up", "link set veth0 addrgenmode none", "link set veth0 up", f"addr add {v4}/24 dev veth0",
                     f"addr add {v6}/64 dev veth0 nodad")  # fmt: skip
            sh("ip", "-netns", netns, "-batch", "-", stdin="\n".join(lines))
        for server in ("http_server.py", "dns_server.py"):
            path = str(Path(__file__).with_name(server))
            servers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", world, sys.executable, path], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
                )
            )
            assert servers[-1].stdout is not None
            assert servers[-1].stdout.readline() == b"ready\n"
        yield Machine(host, world, directory)
    finally:
        for process in servers:
            process.kill()
            process.communicate()
        for netns in (host, world):
            subprocess.run(["ip", "netns", "del", netns], check=False, capture_output=True)
            Path(f"/etc/netns/{netns}/resolv.conf").unlink(missing_ok=True)
            Path(f"/etc/netns/{netns}").rmdir()


@pytest.fixture
def place() -> Iterator[places.Place]:
    """Two pods, anew for each test."""
    with places.built() as built:
        yield built
