"""Ask worker processes for their open connections. Answers go into files in memory: no worker waits for its reader.

Knows records as lines; not who wants them.
"""

from __future__ import annotations

import array
import itertools
import json
import os
import select
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from interceptor.proxy.flows import Flow

# An answer to read, at 400 bytes a flow; and 10 ms of a worker's time, which its connections wait.
MAX_FLOWS = 1000
# A worker that does not answer within this time is busy, or stopped; the others' connections are shown.
PATIENCE_S = 1.0
DONE = b"."


def answer(asked: socket.socket, flows: Iterable[Flow]) -> None:
    """In a worker, when `asked` is readable: write up to MAX_FLOWS + 1 records where the question says."""
    try:
        _, descriptors, _, _ = socket.recv_fds(asked, 1, 1)
    except OSError:
        return
    for descriptor in descriptors:
        lines = (flow.to_json() + "\n" for flow in itertools.islice(flows, MAX_FLOWS + 1))
        with open(descriptor, "wb") as file:
            file.write("".join(lines).encode("utf-8", "backslashreplace"))
        with suppress(OSError):
            asked.send(DONE, socket.MSG_DONTWAIT)


def ask(workers: Sequence[socket.socket]) -> list[Mapping[str, Any]]:
    """The open connections of all `workers`, up to MAX_FLOWS + 1 of each; of those that do not answer in time, none."""
    files = {worker: os.memfd_create("flows", os.MFD_CLOEXEC) for worker in workers}
    found: list[Mapping[str, Any]] = []
    try:
        asked = {worker.fileno(): worker for worker in workers if _put(worker, files[worker])}
        deadline = time.monotonic() + PATIENCE_S
        poll = select.poll()
        for descriptor in asked:
            poll.register(descriptor, select.POLLIN)
        while asked and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                poll.unregister(descriptor)
                worker = asked.pop(descriptor)
                if worker.recv(len(DONE)) == DONE:
                    found += _read(files[worker])
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return found


def _put(worker: socket.socket, descriptor: int) -> bool:
    with suppress(OSError):
        # What came too late the last time is not the answer now.
        while worker.recv(len(DONE), socket.MSG_DONTWAIT):
            pass
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    try:
        return worker.sendmsg([b"?"], rights, socket.MSG_DONTWAIT) == 1
    except OSError:
        return False


def _read(descriptor: int) -> list[Mapping[str, Any]]:
    size = os.fstat(descriptor).st_size
    return [json.loads(line) for line in os.pread(descriptor, size, 0).splitlines()]
