"""The node agent over time: not there yet, killed, replaced, after many requests."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cni.agents import agent, descriptors, resident_bytes, start, wait_until
from tests.cni.calling import PREVIOUS, Binary
from tests.cni.conftest import STATIC
from tests.cni.test_add import is_captured
from tests.cni.test_agent import shim
from tests.rig.kernel import snapshot
from tests.rig.net import Pod, pods

AT_ONCE = 16
TRY_AGAIN_LATER = 11


def test_without_an_agent_an_add_is_to_be_tried_later_and_del_ends_well(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    binary = Binary((str(STATIC),), runtime, str(tmp_path / "none.sock"))
    assert binary.call("DEL", pod.path).status == 0
    status = binary.call("STATUS", "", binary.config("1.1.0", prevResult=None))
    assert status.code == 50
    with ThreadPoolExecutor(2) as pool:
        blocked = pool.submit(binary.call, "ADD", pod.path, timeout_s=40)
        let_through = pool.submit(binary.call, "ADD", pod.path, binary.config(onFailure="bypass"), timeout_s=40)
    assert blocked.result().code == TRY_AGAIN_LATER
    assert let_through.result().object == PREVIOUS
    assert "NOT captured" in let_through.result().stderr


def test_an_add_that_came_too_early_succeeds_once_the_agent_is_there(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    binary = Binary((str(STATIC),), runtime, str(tmp_path / "run" / "cni.sock"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(binary.call, "ADD", pod.path, timeout_s=40)
        with agent(runtime, tmp_path):
            assert waiting.result().status == 0
    assert is_captured(pod)


def test_an_agent_that_takes_over_costs_no_request(runtime: Pod, tmp_path: Path) -> None:
    first = start(runtime, tmp_path)
    with pods(AT_ONCE) as many, ThreadPoolExecutor(AT_ONCE) as pool:
        binary = shim(first, runtime)
        waiting = [pool.submit(binary.call, "ADD", each.path, timeout_s=60, CNI_CONTAINERID=each.name) for each in many]
        second = start(runtime, tmp_path, name="second")
        try:
            assert first.stop() == 0
            assert [each.result().status for each in waiting] == [0] * AT_ONCE
            assert [is_captured(each) for each in many] == [True] * AT_ONCE
            # The new one knows what the old one did.
            assert len(os.listdir(Path(first.socket_path).parent / "attachments")) == AT_ONCE
            assert [binary.call("DEL", each.path, CNI_CONTAINERID=each.name).status for each in many] == [0] * AT_ONCE
            assert os.listdir(Path(first.socket_path).parent / "attachments") == []
        finally:
            second.stop()


def test_a_killed_agent_gives_right_results_or_says_try_again(runtime: Pod, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    over = threading.Event()
    agents = [start(runtime, tmp_path)]

    def kill_and_replace() -> None:
        # Each lives longer than the one before: the first die at work, and on a busy machine some ADDs get through in the end.
        while not over.wait(dice.uniform(0.0, 0.05 * len(agents) ** 2)):
            agents[-1].process.kill()
            agents[-1].process.wait()
            agents.append(start(runtime, tmp_path, name=f"agent{len(agents)}"))

    with pods(AT_ONCE) as many, ThreadPoolExecutor(AT_ONCE + 1) as pool:
        killing = pool.submit(kill_and_replace)
        try:
            binary = shim(agents[0], runtime)
            done = list(pool.map(lambda each: binary.call("ADD", each.path, timeout_s=90), many))
        finally:
            over.set()
            killing.result()
            agents[-1].stop()
        for each, result in zip(many, done, strict=True):
            assert (result.status, result.code) in ((0, 0), (1, TRY_AGAIN_LATER)), (seed, result)
            assert result.status or is_captured(each), (seed, each)
        assert any(result.status == 0 for result in done), seed


def cycles(runtime: Pod, folder: Path, count: int) -> None:
    """ADD and DEL `count` times: memory, descriptors and the host's rules stay as they are."""
    with agent(runtime, folder) as running, pods(1) as (each,):
        binary = shim(running, runtime)
        before = snapshot(runtime)
        for _ in range(20):  # until all that is imported late is there
            assert binary.call("ADD", each.path).status == binary.call("DEL", each.path).status == 0
        memory, opened = resident_bytes(running.process.pid), descriptors(running.process.pid)
        for _ in range(count):
            assert binary.call("ADD", each.path).status == binary.call("DEL", each.path).status == 0
        wait_until(lambda: descriptors(running.process.pid) <= opened, opened)
        assert resident_bytes(running.process.pid) - memory < 5 << 20
        assert snapshot(runtime) == before


@pytest.mark.slow
def test_100_cycles_leave_nothing_behind(runtime: Pod, tmp_path: Path) -> None:
    cycles(runtime, tmp_path, 100)


@pytest.mark.torture
def test_1000_cycles_leave_nothing_behind(runtime: Pod, tmp_path: Path) -> None:
    cycles(runtime, tmp_path, 1000)
