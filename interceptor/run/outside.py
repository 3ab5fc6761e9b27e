"""The host's side of `run`: starts the command, relays its connections from here, passes signals on, reports the flows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from interceptor import facts, launch, links, netns
from interceptor.config import Config
from interceptor.errors import InterceptorError
from interceptor.plan.build import build_plan
from interceptor.plan.model import Plan
from interceptor.proxy.flows import Flow
from interceptor.proxy.server import BoundListener, Proxy
from interceptor.run.inside import INTERFACE, Job, live
from interceptor.run.setup import proxy_settings, run_config
from interceptor.table import Place
from interceptor.values import Family

# What a user or a supervisor sends to a program; SIGTSTP and SIGCONT reach the whole process group by themselves.
FORWARDED = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH}
)
SI_USER_MAX = 0  # siginfo(7): si_code is above it for what the kernel sent, like a terminal's Ctrl-C to its whole process group
MESSAGE_SIZE = 1 << 16
LISTENERS_MAX = 64
GRACE_S = 1.0  # what the command left running has no network any more; a second is enough to flush a file


@dataclass(frozen=True, slots=True)
class Ended:
    """The command's exit code, its captured connections, and what is needed to name the rule of each."""

    exit_code: int
    flows: tuple[Flow, ...]
    place: Place
    message: str = ""


class ChildFailed(InterceptorError):
    """Setting the namespace up failed; text and exit code are the child's."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def run(argv: Sequence[str], config: Config) -> Ended:
    """Run `argv` captured, to its end. Raises InterceptorError when the namespace cannot be set up; then nothing ran."""
    config = run_config(config)
    reach = tuple(network for family in Family for network in links.reachable(family))
    plan = build_plan(config, facts.look())
    settings = proxy_settings(config)
    # Before the fork, and so before there are threads: a signal meant for the command must not end us.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    job = Job(tuple(argv), config, settings, reach, frozenset(mask))
    try:
        return _Run(job, plan).to_the_end()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Run:
    """One command, from fork to wait."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self.job = job
        self.plan = plan
        self.flows: list[Flow] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours

        def child() -> None:
            ours.close()
            live(job, theirs)

        self.pid = launch.spawn(child)
        theirs.close()

    def to_the_end(self) -> Ended:
        waited = False
        try:
            listeners, namespace = self._receive()
            proxy = Proxy(self.job.settings, listeners, self.flows.append, _open_socket)
            relaying = threading.Thread(target=proxy.run, name="proxy")
            relaying.start()
            try:
                self.control.send(b"g")
                failure = self.control.recv(MESSAGE_SIZE)
                status = self._wait()
                waited = True
                _end_left_behind(namespace)
            finally:
                proxy.stop()
                relaying.join()
        finally:
            self.control.close()
            if not waited:
                launch.end([self.pid], grace_s=0)
        place = Place(self.plan, INTERFACE)
        if failure:
            code, message = launch.exec_failure(self.job.argv, json.loads(failure)["errno"])
            return Ended(code, (), place, message)
        return Ended(launch.exit_code(status), tuple(self.flows), place)

    def _receive(self) -> tuple[list[BoundListener], tuple[int, int]]:
        received, descriptors, _flags, _address = socket.recv_fds(self.control, MESSAGE_SIZE, LISTENERS_MAX)
        if not received:
            raise ChildFailed("setting up the command's namespace failed; see above", launch.CHILD_FAILED)
        message = json.loads(received)
        if "error" in message:
            raise ChildFailed(message["error"], message["exit_code"])
        listeners = [adopt(kind, descriptor) for kind, descriptor in zip(message["listeners"], descriptors, strict=True)]
        device, inode = message["netns"]
        return listeners, (device, inode)

    def _wait(self) -> int:
        """Pass signals on until the command has ended; its wait status."""
        while True:
            received = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
            if received.si_signo == signal.SIGCHLD:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    return status
            elif received.si_code <= SI_USER_MAX:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, received.si_signo)


def _open_socket(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM)
