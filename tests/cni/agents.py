"""Node agents for tests: `interceptor cni agent` as a process, in the namespace that plays the host."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interceptor.netns import entered
from tests.rig.net import Pod

DEADLINE_S = 90  # more than repair's RETRY_S: what it found too early it looks at again


@dataclass
class Agent:
    """A running agent, its socket and what it has logged so far."""

    process: subprocess.Popen[bytes]
    socket_path: str
    log_path: Path
    said: list[dict[str, Any]] = field(default_factory=list)

    def log(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.endswith("}")]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first line of `event`; waits for it."""
        return wait_until(lambda: next((line for line in self.log() if line["event"] == event), None), self)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


def wait_until(condition: Callable[[], Any], about: object = "") -> Any:
    """What `condition` gives as soon as it is true."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        select.select([], [], [], 0.02)
    raise AssertionError(f"not within {DEADLINE_S} s: {about}")


def start(runtime: Pod, folder: Path, *options: str, name: str = "agent") -> Agent:
    """Start an agent that listens in `folder`, and wait until it is ready."""
    path, log_path = str(folder / "run" / "cni.sock"), folder / f"{name}.log"
    argv = [sys.executable, "-m", "interceptor", "cni", "agent", "--socket", path, *(options or ("--http", "off"))]
    with entered(runtime.path), log_path.open("ab") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    made = Agent(process, path, log_path)
    try:
        wait_until(lambda: process.poll() is not None or any(line["event"] == "ready" for line in made.log()), log_path)
        assert process.poll() is None, log_path.read_text()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return made


@contextmanager
def agent(runtime: Pod, folder: Path, *options: str, name: str = "agent") -> Iterator[Agent]:
    """A running agent."""
    running = start(runtime, folder, *options, name=name)
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            running.stop()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
