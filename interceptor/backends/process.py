"""The one place that starts programs: an argv list, text in, text out, a deadline. Never a shell."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interceptor.backends import netlink
from interceptor.errors import BackendError, InterceptorError

# iptables-legacy waits for a lock that kube-proxy may hold for seconds; Istio waits 30 s, Kuma 5 s. A hung nft is killed.
TIMEOUT_S = 30.0
# Debian's cron and some images have no sbin in PATH; the programs are there all the same.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# nft's and iptables' messages are compared and shown; xtables' lock stays its own.
ENVIRONMENT = {"LC_ALL": "C", "PATH": SEARCH_PATH}


@dataclass(frozen=True, slots=True)
class Result:
    """What a program printed, and its exit status."""

    status: int
    stdout: str
    stderr: str


def find(program: str) -> str | None:
    """The program's path, or None when it is not installed."""
    # shutil.which does the same, and costs 1.5 ms to import.
    candidates = (f"{folder}/{program}" for folder in SEARCH_PATH.split(":"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def run(
    argv: Sequence[str], *, stdin: str = "", timeout_s: float = TIMEOUT_S, environment: Mapping[str, str] | None = None
) -> Result:
    """Run `argv` to its end, whatever its exit status. Raises BackendError when it cannot run or takes too long."""
    import subprocess  # 6 ms, and with nft over netlink seldom needed

    netlink.forget()
    path = find(argv[0]) if "/" not in argv[0] else argv[0]
    if path is None:
        raise BackendError(f"{argv[0]} is not installed here")
    try:
        done = subprocess.run(
            [path, *argv[1:]],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**ENVIRONMENT, **(environment or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{' '.join(argv)}: no answer for {timeout_s:g} s, ended") from error
    except OSError as error:
        raise BackendError(f"{' '.join(argv)}: {error.strerror}") from error
    return Result(done.returncode, done.stdout, done.stderr)


def run_checked(
    argv: Sequence[str],
    *,
    stdin: str = "",
    doing: str,
    timeout_s: float = TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `argv`; its stdout. Raises BackendError or Unsupported, with `doing` and stderr, unless it exits 0."""
    result = run(argv, stdin=stdin, timeout_s=timeout_s, environment=environment)
    if result.status != 0:
        from interceptor.backends import hints

        raise hints.explained(doing, argv[0], result.status, result.stderr)
    return result.stdout


class Child:
    """A program that answers each line with a line, for as long as it is asked. Ends with close()."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        import subprocess

        self._name = " ".join(argv)
        # Not a pipe: nobody reads it meanwhile, and a full one would stop the child.
        self._stderr = os.memfd_create("stderr")
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**ENVIRONMENT, **environment},
                bufsize=0,
            )
        except OSError as error:
            os.close(self._stderr)
            raise BackendError(f"{self._name}: {error.strerror}") from error

    def ask(self, line: str, *, doing: str, timeout_s: float = TIMEOUT_S) -> str:
        """Send `line`; the answer. Raises BackendError, with `doing` and stderr, when none comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        netlink.forget()
        deadline = time.monotonic() + timeout_s
        received = b""
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError as error:
            raise self._failed(doing) from error
        while not received.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise BackendError(f"{doing}: {self._name}: no answer for {timeout_s:g} s, ended")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._failed(doing)
            received += chunk
        return received.decode()

    def _failed(self, doing: str) -> InterceptorError:
        from interceptor.backends import hints

        status = self._process.wait(TIMEOUT_S)
        said = os.pread(self._stderr, 4096, 0).decode(errors="replace")
        return hints.explained(doing, self._name, status, said)

    def close(self) -> None:
        """End the program, whatever it is doing."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        self._process.wait()
        os.close(self._stderr)
