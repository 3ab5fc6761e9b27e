"""The entry of `interceptor-cni`, script and static file alike: environment and stdin in, one JSON object out.

Decides only who does the work: the node agent when the conflist names its socket, else this process. Until that is known it
imports nothing but what Python has built in: the rest of Python is half of what a request costs with the agent, and the static
file has not started it yet.
"""

from __future__ import annotations

import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VERSION_ANSWER = b'{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}\n'
CHUNK = 1 << 16
AGENT_KEY = b'"agentSocket"'


def started() -> None:
    """Where Python is whole already: nothing."""


def main(complete: Callable[[], None] = started) -> int:
    """Answer one request; the exit status. `complete` starts the rest of Python, for all that is not built into it."""
    _open_standard_descriptors()
    environment = {_text(name): _text(value) for name, value in posix.environ.items()}
    if environment.get("CNI_COMMAND") == "VERSION":
        # Without reading stdin: it may be a terminal, and nobody writes to it.
        _write(1, VERSION_ANSWER)
        return 0
    stdin = _read_all(0) if environment.get("CNI_COMMAND") else b""
    path = plain_agent_socket(stdin)
    if path is None:
        complete()
        complete = started
        path = agent_socket(stdin)
    if path is None:
        status, stdout, stderr = _in_process(environment, stdin)
    else:
        from cni import shim

        status, stdout, stderr = shim.call(environment, stdin, path, complete)
    _write(2, stderr)
    _write(1, stdout)
    return status


def plain_agent_socket(stdin: bytes) -> str | None:
    """The configuration's `agentSocket`, found without `json` (6 ms) where the text leaves no doubt."""
    if stdin.count(AGENT_KEY) != 1 or b"\\" in stdin:
        return None
    before, _, after = stdin.partition(AGENT_KEY)
    # Without a backslash every other piece between quotes is outside of strings.
    outside = b"".join(before.split(b'"')[::2])
    after = after.lstrip()
    value = after[1:].lstrip()
    path, quote, _ = value[1:].partition(b'"')
    if outside.count(b"{") - outside.count(b"}") == 1 and after.startswith(b":") and value.startswith(b'"/') and quote:
        return path.decode("utf-8", "surrogateescape")
    return None


def agent_socket(stdin: bytes) -> str | None:
    """The configuration's `agentSocket`, if it names one."""
    if AGENT_KEY not in stdin and b"\\u" not in stdin:
        return None
    import json

    try:
        found = json.loads(stdin)
    except (ValueError, RecursionError):
        return None  # plugin.py says what is wrong with it
    path = found.get("agentSocket") if isinstance(found, dict) else None
    return path if isinstance(path, str) and path.startswith("/") else None


def _in_process(environment: Mapping[str, str], stdin: bytes) -> tuple[int, bytes, bytes]:
    from cni import plugin
    from cni.deadline import within
    from cni.ops import InProcess
    from cni.output import to_bytes
    from cni.shim import DEADLINE_S
    from cni.wire import told

    said: list[str] = []
    seconds = DEADLINE_S.get(environment.get("CNI_COMMAND", ""))
    status, result = within(
        seconds, lambda: plugin.process(environment, stdin, InProcess(), said.append), environment, stdin, said.append
    )
    return status, to_bytes(result), told(said)


def _text(given: bytes) -> str:
    # As os.environ does it: what is no UTF-8 survives.
    return given.decode("utf-8", "surrogateescape")


def _read_all(descriptor: int) -> bytes:
    parts: list[bytes] = []
    while True:
        try:
            part = posix.read(descriptor, CHUNK)
        except BlockingIOError:
            _wait_for(descriptor)
            continue
        except OSError:
            # A directory, say. That it is no JSON is told below; and Python does not start with it.
            posix.dup2(posix.open("/dev/null", posix.O_RDWR), descriptor)
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)


def _write(descriptor: int, text: bytes) -> None:
    while text:
        try:
            text = text[posix.write(descriptor, text) :]
        except BlockingIOError:
            _wait_for(descriptor, writing=True)
        except OSError:
            return  # nobody listens


def _wait_for(descriptor: int, *, writing: bool = False) -> None:
    # A runtime may have left its end's O_NONBLOCK on ours: half an answer would be none.
    import select

    select.select([] if writing else [descriptor], [descriptor] if writing else [], [])


def _open_standard_descriptors() -> None:
    # A runtime may have closed one: then the next file that is opened would get its number, and our words.
    for descriptor in range(3):
        try:
            posix.fstat(descriptor)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR)


if __name__ == "__main__":
    sys.exit(main())
