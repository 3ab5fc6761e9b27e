"""Hand a request to the node agent. Runs once for each pod, so it imports next to nothing: no json, no dataclasses, no logging.

Failing closed is decided here: without the agent an ADD is answered "try again later" (11), a DEL or GC ends well.
"""

from __future__ import annotations

import posix
import time

from cni import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

# With and without the agent. The runtime waits for minutes and is not told what it waits for; DEL must not hold up a pod's end.
DEADLINE_S = {"ADD": 30.0, "CHECK": 10.0, "STATUS": 5.0, "DEL": 4.0, "GC": 4.0}
# An agent that is being replaced is away for less than a second.
RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
NETNS = "/proc/self/ns/net"
SELF_NETNS = 8  # protocol.INVALID_NETNS; that module costs 10 ms
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50

Outcome = tuple[int, bytes, bytes]


def call(environment: Mapping[str, str], stdin: bytes, path: str, complete: Callable[[], None]) -> Outcome:
    """(exit status, stdout, stderr) of a request, from the agent at `path` or, when it cannot be had, from here.

    `complete` starts what the static file has not started of Python; an error's answer needs it.
    """
    answer = _asked(environment, stdin, path)
    if isinstance(answer, Refusal):
        complete()
        return answer.outcome(environment, stdin)
    return answer


class Refusal:
    """An error to answer with: its code and words."""

    __slots__ = ("code", "details", "msg")

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        self.code, self.msg, self.details = code, msg, details

    def outcome(self, environment: Mapping[str, str], stdin: bytes) -> Outcome:
        """As this request's answer."""
        from cni import plugin
        from cni.output import to_bytes
        from cni.protocol import CniError

        said: list[str] = []
        error = CniError(self.code, self.msg, self.details)
        status, result = plugin.not_done(environment, stdin, error, said.append)
        return status, to_bytes(result), wire.told(said)


def _asked(environment: Mapping[str, str], stdin: bytes, path: str) -> Outcome | Refusal:
    command = environment.get("CNI_COMMAND", "")
    deadline = time.monotonic() + DEADLINE_S.get(command, DEADLINE_S["ADD"])
    namespace, refusal = _open_netns(command, environment)
    if refusal is not None:
        return refusal
    try:
        try:
            message = wire.request(environment, stdin)
        except wire.WireError as error:
            return _without_agent(command, str(error))
        return _ask(command, message, path, namespace, deadline)
    finally:
        if namespace is not None:
            posix.close(namespace)


def _ask(command: str, message: bytes, path: str, namespace: int | None, deadline: float) -> Outcome | Refusal:
    pause = RETRY_FIRST_S
    while True:
        try:
            return _exchange(path, message, namespace, deadline)
        except (OSError, ValueError, wire.WireError) as error:  # ValueError: a path that no file can have
            trouble = f"{path}: {error.strerror or error}" if isinstance(error, OSError) else f"{path}: {error}"
        # Each command may be carried out twice: an agent that died in the middle is asked again when it is back.
        if command == "STATUS" or time.monotonic() + pause >= deadline:
            return _without_agent(command, trouble)
        time.sleep(pause)
        pause = min(pause * 2, RETRY_MOST_S)


def _exchange(path: str, message: bytes, namespace: int | None, deadline: float) -> Outcome:
    import _socket  # socket.py costs 3 ms: selectors, enum

    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(None, "no answer in time")
    sock: socket.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)  # type: ignore[assignment]
    try:
        sock.settimeout(left)
        sock.connect(path)
        if namespace is None:
            sock.sendall(message)
        else:
            rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, namespace.to_bytes(4, "little"))  # both our machines are
            sent = sock.sendmsg([message], [rights])
            if sent < len(message):  # sending nothing to an agent that has answered already is a broken pipe all the same
                sock.sendall(message[sent:])
        head = _receive(sock, wire.ANSWER_HEAD)
        return wire.read_answer(head, _receive(sock, wire.answer_size(head)))
    finally:
        sock.close()


def _receive(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = sock.recv(size)
        if not part:
            raise wire.WireError("the agent ended before it had answered")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _open_netns(command: str, environment: Mapping[str, str]) -> tuple[int | None, Outcome | Refusal | None]:
    """The pod's namespace as a descriptor, and an answer where there is nothing to ask the agent for."""
    path = environment.get("CNI_NETNS", "")
    if not path or command not in ("ADD", "CHECK", "DEL"):
        return None, None  # whether it may be missing is the agent's to say
    try:
        # Nothing but a namespace is opened: opening a FIFO would wait for a writer, opening a device may do anything.
        found = posix.stat(path)
        is_own = (found.st_dev, found.st_ino) == _own()
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)  # type: ignore[attr-defined]
    except OSError as error:
        if command == "DEL":
            return None, None  # nothing to take rules from, and yet the agent should forget this pod
        return None, Refusal(SELF_NETNS, f"CNI_NETNS {path}: {error.strerror}")
    if is_own and environment.get("CNI_NETNS_OVERRIDE", "").lower() not in ("1", "true"):
        posix.close(descriptor)
        if command == "DEL":
            return None, (0, b"", wire.told([f"CNI_NETNS {path} is the runtime's own network namespace: left as it is"]))
        return None, Refusal(SELF_NETNS, f"CNI_NETNS {path} is the network namespace of the runtime itself")
    return descriptor, None


def _own() -> tuple[int, int]:
    own = posix.stat(NETNS)
    return own.st_dev, own.st_ino


def _without_agent(command: str, trouble: str) -> Outcome | Refusal:
    if command in ("DEL", "GC"):
        # All that there is to take away is in the pod's own namespace, and goes with it.
        return 0, b"", wire.told([f"{command} without the node agent: {trouble}"])
    code = NOT_AVAILABLE if command == "STATUS" else TRY_AGAIN_LATER
    return Refusal(code, "the interceptor node agent cannot be reached", trouble)
