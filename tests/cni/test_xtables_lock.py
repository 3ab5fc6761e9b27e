"""xtables' lock is the host's: an ADD does not wait for who works on other tables, but for who works on the pod's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cni.launcher import launcher
from interceptor.backends import xtables_lock
from interceptor.netns import entered
from interceptor.render.names import IPTABLES_PREFIX
from tests.cni.agents import wait_until
from tests.cni.calling import Binary, variables
from tests.rig.kernel import snapshot
from tests.rig.net import Pod

# A lock of the test's own in place of the host's, which other tests need meanwhile.
WITH_ITS_OWN = 'touch /run/xtables.lock; mount --bind "$1" /run/xtables.lock; shift; exec "$@"'
READ_ONLY_RUN = """
mount -t tmpfs none "$1"
mkdir "$1/netns"
mount --rbind /run/netns "$1/netns"
mount -o remount,ro "$1"
mount --rbind "$1" /run
shift
exec "$@"
"""
HOLDER = (
    "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "xtables.lock"
    path.touch()
    return path


@pytest.fixture
def script(runtime: Pod, lock: Path, tmp_path: Path) -> Binary:
    path = tmp_path / "interceptor-cni"
    path.write_text(launcher())
    path.chmod(0o755)
    return Binary(("unshare", "-m", "sh", "-ec", WITH_ITS_OWN, "sh", str(lock), str(path)), runtime)


@contextmanager
def held(lock: Path, where: Pod) -> Iterator[subprocess.Popen[bytes]]:
    """A process in that namespace has the lock until its stdin is closed."""
    argv = [sys.executable, "-ISc", HOLDER, str(lock)]
    with entered(where.path):
        holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder
    finally:
        holder.communicate()


def opened_by(lock: Path) -> set[int]:
    """Processes that have the file open."""
    wanted, found = os.stat(lock), set()
    for each in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.path.samestat(os.stat(each), wanted):
                found.add(int(each.parts[2]))
    return found


@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy", "libiptc"])
def test_an_add_does_not_wait_for_who_works_on_the_hosts_tables(
    backend: str, script: Binary, lock: Path, runtime: Pod, pod: Pod
) -> None:
    with held(lock, runtime):
        config = script.config(capture={"backend": backend})
        done = script.call("ADD", pod.path, config)
        assert (done.status, done.stderr) == (0, "")
        assert script.call("CHECK", pod.path, config).status == 0


@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy", "libiptc"])
def test_a_read_only_root_without_the_lock_is_enough(
    backend: str, script: Binary, runtime: Pod, pod: Pod, tmp_path: Path
) -> None:
    # As the image is run in a cluster: podman alone mounts something on /run.
    root = tmp_path / "root"
    root.mkdir()
    binary = Binary(("unshare", "-m", "sh", "-ec", READ_ONLY_RUN, "sh", str(root), script.argv[-1]), runtime)
    config = binary.config(capture={"backend": backend})
    for command in ("ADD", "CHECK", "DEL"):
        done = binary.call(command, pod.path, config)
        assert (done.status, done.stderr) == (0, ""), done


def test_an_add_waits_for_who_works_on_the_pods(script: Binary, lock: Path, pod: Pod) -> None:
    config = script.config(capture={"backend": "iptables-legacy"})
    with ThreadPoolExecutor(1) as pool:
        with held(lock, pod) as holder:
            adding = pool.submit(script.call, "ADD", pod.path, config)
            wait_until(lambda: opened_by(lock) - {holder.pid}, lock)
            assert IPTABLES_PREFIX not in pod.run("iptables-legacy-save")
        assert adding.result().status == 0
    assert IPTABLES_PREFIX in pod.run("iptables-legacy-save")


@pytest.mark.parametrize("backend", ["iptables-legacy", "libiptc"])
def test_an_add_that_is_ended_leaves_nobody_waiting(backend: str, script: Binary, lock: Path, pod: Pod) -> None:
    before = snapshot(pod)
    config = json.dumps(script.config(capture={"backend": backend})).encode()
    with held(lock, pod) as holder:
        with entered(pod.path):
            argv, given = script.argv, variables("ADD", pod.path, {"CNI_NETNS_OVERRIDE": "1"})
            adding = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=given)
        assert adding.stdin is not None
        adding.stdin.write(config)
        adding.stdin.close()
        adding.stdin = None
        wait_until(lambda: opened_by(lock) - {holder.pid}, lock)
        adding.terminate()
        answer, _ = adding.communicate(timeout=60)
        assert json.loads(answer)["code"] == 11
        assert adding.returncode == 1
        wait_until(lambda: not opened_by(lock) - {holder.pid}, lock)
    assert script.call("DEL", pod.path).status == 0
    assert snapshot(pod) == before


def test_who_has_it_is_told_apart_by_namespace(lock: Path, runtime: Pod, pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xtables_lock, "PATH", str(lock))

    def asked() -> bool:
        with entered(pod.path):
            return xtables_lock.is_held_elsewhere()

    assert not asked()
    with held(lock, runtime):
        assert asked()
    with held(lock, pod):
        assert not asked()
    lock.unlink()
    assert not asked()
