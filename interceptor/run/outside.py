"""The host's side of `run`: starts the command, relays its connections from here, passes signals on, reports the flows."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from interceptor import facts, launch, links, netns
from interceptor.errors import InterceptorError, NetnsError
from interceptor.plan.build import build_plan
from interceptor.plan.model import Plan
from interceptor.proxy.flows import Flow
from interceptor.proxy.server import Proxy
from interceptor.run.handover import MESSAGE_SIZE, receive_listeners
from interceptor.run.inside import ADDRESSES, INTERFACE, Job, live
from interceptor.run.setup import check_privilege, proxy_settings, run_config
from interceptor.sources import Resolved
from interceptor.table import Place
from interceptor.values import Family

# What a user or a supervisor sends to a program; SIGTSTP and SIGCONT reach the whole process group by themselves.
FORWARDED = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH}
)
SI_USER_MAX = 0  # siginfo(7): si_code is above it for what the kernel sent, like a terminal's Ctrl-C to its whole process group
GRACE_S = 1.0  # what the command left running has no network any more; a second is enough to flush a file


@dataclass(frozen=True, slots=True)
class Ended:
    """The command's exit code, its captured connections, and what is needed to name the rule of each."""

    exit_code: int
    flows: tuple[Flow, ...]
    place: Place


class NotStarted(InterceptorError):
    """There is no such command, or it can't be run; the exit code is a shell's."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def run(argv: Sequence[str], resolved: Resolved, outside: str | None = None) -> Ended:
    """Run `argv` captured, to its end; its connections are made in the namespace `outside`, None for ours.

    This process goes there, and stays. Raises InterceptorError when nothing could be run.
    """
    if not argv[0]:
        raise NotStarted("'': command not found", launch.NOT_FOUND)
    config = run_config(resolved)
    check_privilege(config, os.geteuid(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if outside is not None:
        netns.enter_for_good(netns.locate(outside))
    found = facts.look()
    reach = [network for family in Family for network in links.reachable(family)]
    # With `outside`, the servers that the command knows are ours, and need not be in reach from there: they are captured.
    reach += [server for server in found.resolvers if config.dns != "off" and not (server.is_loopback or server in reach)]
    plan = build_plan(config, found)
    # The command reads the resolv.conf of this mount namespace; the proxy asks who can be asked from outside.
    settings = proxy_settings(config, plan, facts.look(outside))
    # Before the fork, and so before there are threads: a signal meant for the command must not end us.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    job = Job(tuple(argv), config, settings, tuple(reach), frozenset(mask))
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
        self.defect: Exception | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours

        def child() -> None:
            ours.close()
            live(job, theirs)

        # What the command leaves running becomes our child, not init's: so it can be ended and waited for.
        launch.prctl(launch.PR_SET_CHILD_SUBREAPER, 1)
        self.pid = launch.spawn(child)
        theirs.close()

    def to_the_end(self) -> Ended:
        """Let it run; raises SetupFailed when it cannot."""
        over = False
        try:
            handed = receive_listeners(self.control)
            proxy = Proxy(self.job.settings, handed.listeners, self.flows.append)
            relaying = threading.Thread(target=self._relay, args=(proxy,), name="proxy")
            # Our own look at the accept queues, for the time when the proxy is about to stop.
            queues = [os.dup(each.sock.fileno()) for each in handed.listeners if each.protocol == "tcp"]
            relaying.start()
            try:
                self.control.send(b"g")
                # Empty once exec has closed the command's end.
                failure = self.control.recv(MESSAGE_SIZE)
                status = self._wait()
                over = True
                _end_left_behind(handed.namespace)
                _wait_until_accepted(queues)
            finally:
                proxy.stop()
                relaying.join()
                for queue in queues:
                    os.close(queue)
        finally:
            self.control.close()
            if not over:
                launch.end([self.pid], grace_s=0)
        if self.defect is not None:
            raise self.defect
        place = Place(self.plan, INTERFACE, frozenset(address.ip for address in ADDRESSES.values()))
        if failure:
            code, message = launch.exec_failure(self.job.argv, json.loads(failure)["errno"])
            raise NotStarted(message, code)
        return Ended(launch.exit_code(status), tuple(self.flows), place)

    def _relay(self, proxy: Proxy) -> None:
        try:
            proxy.run()
        except Exception as error:  # noqa: BLE001 - raised again by to_the_end(), when the command is over
            self.defect = error

    def _wait(self) -> int:
        """Pass signals on until the command has ended; its wait status."""
        while True:
            received = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
            if received.si_signo == signal.SIGCHLD:
                status = _reap(self.pid)
                if status is not None:
                    return status
            elif received.si_code <= SI_USER_MAX:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, received.si_signo)


def _wait_until_accepted(queues: list[int]) -> None:
    """Until the proxy has taken every connection that the command opened: the last one's bytes may still wait to be sent on."""
    waiting = select.poll()
    for queue in queues:
        waiting.register(queue, select.POLLIN)
    deadline = time.monotonic() + GRACE_S
    while waiting.poll(0) and time.monotonic() < deadline:
        time.sleep(0.001)


def _end_left_behind(namespace: tuple[int, int]) -> None:
    """End what the command left running in its namespace: without the proxy it has no network any more."""
    deadline = time.monotonic() + GRACE_S
    number = signal.SIGTERM
    while pids := _inhabitants(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        time.sleep(0.01)
        _reap()
        if time.monotonic() > deadline:
            if number == signal.SIGKILL:
                return  # not ours to kill (a set-uid program); the kernel keeps its namespace while it runs
            number, deadline = signal.SIGKILL, time.monotonic() + GRACE_S


def _inhabitants(namespace: tuple[int, int]) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(NetnsError):
                if netns.identity(f"/proc/{entry}/ns/net") == namespace:
                    found.append(int(entry))
    return found


def _reap(wanted: int = 0) -> int | None:
    """Take leave of all who have ended, orphans of the command too: a zombie looks alive to kill(2). `wanted`'s wait status."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == wanted:
                found = status
    return found
