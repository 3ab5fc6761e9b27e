"""Disturbed in the middle: killed, its namespace deleted, many at once. The next call makes whole what is not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from interceptor.netns import entered
from tests.cni.calling import Binary, variables
from tests.cni.test_add import is_captured
from tests.cni.test_static import in_a_bare_root
from tests.rig.kernel import snapshot
from tests.rig.net import Pod, pods

AT_ONCE = 8


def begun(binary: Binary, command: str, netns: str) -> subprocess.Popen[bytes]:
    """A call under way: it has its environment and its stdin."""
    with entered(binary.runtime.path):
        running = subprocess.Popen(
            binary.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables(command, netns, {})
        )
    assert running.stdin is not None
    running.stdin.write(json.dumps(binary.config()).encode())
    running.stdin.close()
    running.stdin = None  # communicate() would flush it
    return running


@pytest.mark.torture
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_killed_at_any_moment_the_next_calls_mend_it(binary: Binary, pod: Pod, command: str) -> None:
    dice = random.Random(4)
    empty = snapshot(pod)
    for _ in range(5):
        if command == "DEL":
            assert binary.call("ADD", pod.path).status == 0
        running = begun(binary, command, pod.path)
        try:
            running.wait(dice.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
        running.communicate()
        assert binary.call("DEL", pod.path).status == 0
        assert snapshot(pod) == empty
        assert binary.call("ADD", pod.path).status == 0
        assert is_captured(pod)
        assert binary.call("DEL", pod.path).status == 0


@pytest.mark.torture
def test_a_namespace_that_is_deleted_meanwhile_is_no_trouble(binary: Binary) -> None:
    dice = random.Random(5)
    before = snapshot(binary.runtime)
    for _ in range(4):
        with pods(1) as (gone,):
            running = begun(binary, "ADD", gone.path)
            try:
                running.wait(dice.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                subprocess.run(["ip", "netns", "delete", gone.name], check=True)
            output, _ = running.communicate(timeout=60)
            assert running.returncode == 0 or json.loads(output)["code"] in (8, 100, 101), output
            assert binary.call("DEL", gone.path).status == 0
    assert snapshot(binary.runtime) == before


@pytest.mark.torture
def test_many_at_once_do_not_disturb_each_other(binary: Binary) -> None:
    before = snapshot(binary.runtime)
    with pods(AT_ONCE) as many, ThreadPoolExecutor(AT_ONCE) as pool:

        def all_at_once(command: str) -> set[int]:
            return {
                done.status for done in pool.map(lambda each: binary.call(command, each.path, CNI_CONTAINERID=each.name), many)
            }

        empty = [snapshot(each) for each in many]
        assert all_at_once("ADD") == {0}
        assert [is_captured(each) for each in many] == [True] * AT_ONCE
        assert all_at_once("CHECK") == {0}
        assert all_at_once("DEL") == {0}
        assert [snapshot(each) for each in many] == empty
    assert snapshot(binary.runtime) == before


def test_in_process_status_tells_what_is_missing_and_del_needs_nothing(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    before = snapshot(pod)
    plain = Binary((os.fspath(Path(__file__).parents[2] / "build/cni/interceptor-cni"),), runtime)
    assert plain.call("ADD", pod.path).status == 0
    shared = tmp_path / "shared"
    shared.mkdir()
    bare = in_a_bare_root(tmp_path / "root", shared, runtime)
    config = bare.config("1.1.0", capture={}, prevResult=None)
    status = bare.call("STATUS", None, config)
    assert status.code == 50
    assert "nft" in status.object["details"]
    assert bare.call("DEL", pod.path, config).status == 0
    assert snapshot(pod) == before
