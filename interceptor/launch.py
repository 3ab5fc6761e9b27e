"""Start the programs of others: `run`'s command, `demo`'s client. fork and exec with argv lists, never a shell.

Not for nft and its like: they are called through backends/process.py, which waits for them and reads their answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

CLONE_NEWUSER = 0x10000000  # linux/sched.h
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
CAP_NET_ADMIN = 12  # linux/capability.h
LINUX_CAPABILITY_VERSION_3 = 0x20080522
# What a shell answers: sh(1), "Exit Status for Commands".
NOT_FOUND, NOT_EXECUTABLE, KILLED = 127, 126, 128
# CPython ignores these, and what is ignored stays so in the command.
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
CHILD_FAILED = 70  # sysexits.h: EX_SOFTWARE


def unshare(flags: int) -> None:
    """unshare(2); os.unshare is Python 3.12's. Raises OSError."""
    _call("unshare", flags)


def prctl(option: int, *arguments: int) -> None:
    """prctl(2). Raises OSError."""
    padded = (*arguments, 0, 0, 0, 0)[:4]
    _call("prctl", option, *(ctypes.c_ulong(argument) for argument in padded))


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def keep_capabilities_over_exec(capabilities: Iterable[int]) -> None:
    """Let programs that this process starts have `capabilities`, though it is not root: capabilities(7), "Ambient"."""
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: low words, then high words
    _call("capget", header, sets)
    for capability in capabilities:
        sets[2] |= 1 << capability
    _call("capset", header, sets)
    for capability in capabilities:
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def drop_ambient_capabilities() -> None:
    """Undo keep_capabilities_over_exec()."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def spawn(child: Callable[[], None]) -> int:
    """Run `child` in a process of its own, which ends with it and dies with this one; its pid.

    Call it while there is one thread: a fork takes only the calling one along.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with(parent)
        child()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - nothing may go on in two processes
        with contextlib.suppress(OSError):
            os.write(2, f"interceptor: {error}\n".encode())
    finally:
        os._exit(CHILD_FAILED)


def die_with(parent: int) -> None:
    """Be killed when `parent`, which started us, ends.

    The kernel forgets this when uids or capabilities change (prctl(2), PR_SET_PDEATHSIG): say it again then.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(CHILD_FAILED)


def exec_command(argv: Sequence[str]) -> NoReturn:
    """Become `argv`, found in PATH, with our environment and the signals as a shell would leave them. Raises OSError."""
    for number in IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    os.execvp(argv[0], list(argv))  # noqa: S606 - the user's own command


def become(uid: int, gid: int) -> None:
    """Drop root for good."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def exit_code(status: int) -> int:
    """A shell's exit code for a wait(2) status: the program's own, or 128 + the signal that killed it."""
    return KILLED + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def exec_failure(argv: Sequence[str], number: int) -> tuple[int, str]:
    """A shell's exit code for a failed exec, and what to tell the user."""
    # execvp answers EACCES when only a directory of PATH could not be read.
    is_nowhere = "/" not in argv[0] and shutil.which(argv[0], mode=os.F_OK) is None
    if is_nowhere:
        return NOT_FOUND, f"{argv[0]}: command not found"
    return NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE, f"{argv[0]}: {os.strerror(number)}"


def end(pids: Iterable[int], *, grace_s: float) -> None:
    """End these children of ours: SIGTERM, after `grace_s` SIGKILL; then they are waited for. Ended ones are fine."""
    left = set(pids)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if not _is_over(pid)}
        if left:
            time.sleep(0.005)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _is_over(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
