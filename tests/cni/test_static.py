"""The static file as a thing: small, the same whenever it is built, and in need of nothing around it."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from interceptor.netns import entered
from tests.cni.agents import Agent, agent
from tests.cni.calling import Binary, variables
from tests.cni.conftest import STATIC
from tests.cni.test_add import is_captured
from tests.rig.net import Pod

PT_DYNAMIC, PT_INTERP = 2, 3  # elf.h
# A root that holds the plugin, /proc, the namespaces and a directory of the test's, all of it read-only; /tmp executes nothing.
BARE_ROOT = """
mount -t tmpfs none "$1"
mkdir -p "$1/proc" "$1/tmp" "$1/run/netns"
cp "$2" "$1/plugin"
mount -t tmpfs -o noexec none "$1/tmp"
mkdir -p "$1$3"
mount --rbind /proc "$1/proc"
mount --rbind /run/netns "$1/run/netns"
mount --bind "$3" "$1$3"
mount -o remount,ro,bind "$1$3"
mount -o remount,ro "$1"
exec chroot "$1" /plugin
"""


def in_a_bare_root(root: Path, shared: Path, runtime: Pod) -> Binary:
    root.mkdir()
    script = ("unshare", "-m", "sh", "-ec", BARE_ROOT, "sh", str(root), str(STATIC), str(shared))
    return Binary(script, runtime)


def test_it_is_static_and_at_most_12_mb() -> None:
    content = STATIC.read_bytes()
    (start,) = struct.unpack_from("=Q", content, 32)  # e_phoff
    size, count = struct.unpack_from("=HH", content, 54)  # e_phentsize, e_phnum
    kinds = {struct.unpack_from("=I", content, start + number * size)[0] for number in range(count)}
    assert kinds & {PT_DYNAMIC, PT_INTERP} == set()
    assert len(content) <= 12_000_000


@pytest.mark.torture
def test_built_again_elsewhere_it_has_the_same_bytes(tmp_path: Path) -> None:
    build = STATIC.parents[2] / "cni/static/build.py"
    environment = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": "7", "TMPDIR": str(tmp_path)}
    argv = ["/usr/bin/python3.11", str(build), str(tmp_path / "built")]
    subprocess.run(argv, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert (tmp_path / "built").read_bytes() == STATIC.read_bytes()


def test_it_reads_no_file_of_the_hosts() -> None:
    argv = ["strace", "-f", "-e", "trace=open,openat,openat2,execve", str(STATIC)]
    done = subprocess.run(argv, env=variables("VERSION", None, {}), capture_output=True, text=True, check=True)
    opened = [line.split('"')[1] for line in done.stderr.splitlines() if '"' in line]
    # The C library's look at the time zone.
    assert set(opened) - {"/etc/localtime"} == {str(STATIC)}


@pytest.fixture
def running(runtime: Pod, tmp_path: Path) -> Iterator[Agent]:
    with agent(runtime, tmp_path) as found:
        yield found


def test_with_the_agent_it_needs_nothing_on_the_host(runtime: Pod, running: Agent, tmp_path: Path, pod: Pod) -> None:
    binary = in_a_bare_root(tmp_path / "root", Path(running.socket_path).parent, runtime)
    config = binary.config(agentSocket=running.socket_path)
    done = binary.call("ADD", pod.path, config)
    assert (done.status, done.stderr) == (0, "")
    assert is_captured(pod)
    assert binary.call("DEL", pod.path, config).status == 0


def test_without_the_agent_it_says_what_the_host_lacks(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    done = in_a_bare_root(tmp_path / "root", shared, runtime).call("ADD", pod.path, Binary((), runtime).config(capture={}))
    assert done.code == 101
    assert "nft is not installed" in done.object["details"]
    with entered(pod.path):
        assert subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True).stdout == b""
