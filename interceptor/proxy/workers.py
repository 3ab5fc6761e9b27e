"""Several proxy processes under one that watches: one that dies is replaced, all end together. Knows nothing of connections.

The supervisor holds every worker's listening sockets, so connections that wait in a dead worker's queue wait for the next.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from select import EPOLLIN
from typing import Literal, Protocol, TypeAlias

from interceptor.errors import ProxyError
from interceptor.proxy.loop import Loop

# Told to stop, workers drain within their deadline; one that does not is killed this much later.
STOP_GRACE_S = 2.0
# A worker that died young will die again: do not spend the machine on starting it.
REPLACE_DELAY_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
READY = b"r"


@dataclass(slots=True)
class Link:
    """A worker's end of what ties it to the supervisor."""

    index: int
    lifeline: int  # a pipe's reading end: its end of file says that the supervisor is gone
    ready: int  # a pipe's writing end
    asked: socket.socket  # on which it is asked for its open connections (open_flows.py)

    def say_ready(self) -> None:
        """The worker accepts connections now."""
        os.write(self.ready, READY)
        os.close(self.ready)


# Serves as worker until told to stop by a signal or the lifeline; its exit code.
Serve: TypeAlias = Callable[[Link], int]


@dataclass(slots=True)
class _Worker:
    pid: int
    started: float  # time.monotonic()
    ready: int  # a pipe's reading end; -1 once it was ready
    asking: socket.socket


class Books(Protocol):
    """What is counted for all workers (metrics.Region)."""

    def worker_ended(self, number: int) -> int:
        """Worker `number` is no more; how many connections died with it."""

    def worker_replaced(self) -> None:
        """Another one is started in the place of one that died."""


class Supervisor:
    """`count` processes that `serve`. Make it before there are threads.

    `let_go` gives up what is held for the next worker, when there will be no next: else a port stays open that nobody serves.
    """

    def __init__(self, count: int, serve: Serve, let_go: Callable[[], None], drain_deadline_s: float, books: Books) -> None:
        self._count = count
        self._serve = serve
        self._let_go = let_go
        self._drain_deadline_s = drain_deadline_s
        self._loop = Loop()
        self._loop.on_wakeup = self._signalled
        self._workers: dict[int, _Worker] = {}  # by index
        self._books = books
        self._lifeline = os.pipe2(os.O_CLOEXEC)
        self._stopping = 0
        self._exit_code = 0
        self._were_ready = False
        self._on_ready: Callable[[], None] = lambda: None

    @property
    def loop(self) -> Loop:
        """What it waits with; most of the time idle."""
        return self._loop

    @property
    def state(self) -> Literal["starting", "serving", "draining"]:
        """Where all of it is in its life."""
        if self._stopping:
            return "draining"
        # A worker that is being replaced is missed by nobody as long as there are others.
        return "serving" if self._were_ready and self.asking() else "starting"

    def pids(self) -> dict[int, int]:
        """The workers' process ids, by index."""
        return {index: worker.pid for index, worker in self._workers.items()}

    def asking(self) -> list[socket.socket]:
        """The sockets over which the workers that are ready can be asked for their connections."""
        return [worker.asking for worker in self._workers.values() if worker.ready < 0]

    def drain(self) -> None:
        """Begin to end, as on SIGTERM; a second time changes nothing."""
        if not self._stopping:
            self._stop()

    def run(self, on_ready: Callable[[], None]) -> int:
        """Serve until SIGTERM or SIGINT, then until all have drained; the exit code.

        `on_ready` is called once all accept connections. When one cannot even begin, all end, with its exit code.
        """
        self._on_ready = on_ready
        descriptor = signal.set_wakeup_fd(self._loop.wake_write, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda _number, _frame: None) for number in SIGNALS}
        try:
            for index in range(self._count):
                self._start(index)
            self._loop.run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
            for worker in self._workers.values():
                worker.asking.close()
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)
            self._loop.close()
            for end in self._lifeline:
                os.close(end)
        return self._exit_code

    def _start(self, index: int) -> None:
        if self._stopping:
            return
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        asking, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            asking.close()
            asked.close()
            raise ProxyError(f"starting worker {index}: {error.strerror}") from error
        if pid == 0:
            os.close(reading)
            asking.close()
            self._become(Link(index, self._lifeline[0], writing, asked))
        os.close(writing)
        asked.close()
        self._workers[index] = _Worker(pid, time.monotonic(), reading, asking)
        self._loop.watch(reading, EPOLLIN, lambda _events: self._heard(index))

    def _become(self, link: Link) -> None:
        """The child: never returns."""
        code = 1
        try:
            # A terminal's Ctrl-C is for the supervisor, which passes it on: twice would mean "now".
            os.setpgid(0, 0)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            self._loop.close()
            for worker in self._workers.values():
                worker.asking.close()
                if worker.ready >= 0:
                    os.close(worker.ready)
            os.close(self._lifeline[1])
            code = self._serve(link)
        except ProxyError as error:
            print(f"interceptor: worker {link.index}: {error}", file=sys.stderr)
            code = error.exit_code
        except BaseException:  # noqa: BLE001 - the process ends here, and says why
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _heard(self, index: int) -> None:
        worker = self._workers[index]
        if os.read(worker.ready, 1) == READY:
            self._loop.unwatch(worker.ready)
            os.close(worker.ready)
            worker.ready = -1
            if len(self._workers) == self._count and all(each.ready < 0 for each in self._workers.values()):
                self._were_ready = True
                on_ready, self._on_ready = self._on_ready, lambda: None
                on_ready()
        else:
            self._loop.unwatch(worker.ready)  # it died; SIGCHLD tells how

    def _signalled(self, numbers: bytes) -> None:
        if signal.SIGCHLD in numbers:
            self._reap()
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop()

    def _stop(self) -> None:
        self._stopping += 1
        for worker in self._workers.values():
            os.kill(worker.pid, signal.SIGTERM)
        if self._stopping == 1:
            self._let_go()
            self._loop.later(self._drain_deadline_s + STOP_GRACE_S, self._loop.stop)
        self._end_when_alone()

    def _reap(self) -> None:
        for index, worker in list(self._workers.items()):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            del self._workers[index]
            was_ready = worker.ready < 0
            if not was_ready:
                self._loop.unwatch(worker.ready)
                os.close(worker.ready)
            worker.asking.close()
            lost = self._books.worker_ended(index)
            if self._stopping:
                continue
            if not was_ready:
                self._exit_code = os.waitstatus_to_exitcode(status) or 1
                self._stop()
                return
            self._replace(index, worker, f"{_how(status)} with {lost} connections open")
        self._end_when_alone()

    def _replace(self, index: int, worker: _Worker, how: str) -> None:
        self._books.worker_replaced()
        print(f"interceptor: worker {index} (pid {worker.pid}) {how}; replacing it", file=sys.stderr, flush=True)
        if time.monotonic() - worker.started < REPLACE_DELAY_S:
            self._loop.later(REPLACE_DELAY_S, lambda: self._start(index))
        else:
            self._start(index)

    def _end_when_alone(self) -> None:
        if self._stopping and not self._workers:
            self._loop.stop()


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
