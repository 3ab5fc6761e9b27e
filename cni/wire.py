"""The bytes between the shim and the node agent. No I/O; and no import, since the shim must start in a millisecond.

Request: MAGIC, length of the environment, length of stdin (32 bits each, big-endian), the CNI_* variables as NUL-ended
KEY=VALUE, and stdin. The pod's network namespace comes as a descriptor with the first byte (SCM_RIGHTS), so that the agent
needs no path of the host's.
Answer: MAGIC, exit status, length of stdout, length of stderr, both texts.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAGIC = b"ITC1"
REQUEST_HEAD = len(MAGIC) + 8
ANSWER_HEAD = len(MAGIC) + 12
# A conflist with a long prevResult is a few KiB; 1 MiB must pass, and nobody may make the agent hold more.
MAX_STDIN = 8 << 20
MAX_ENVIRONMENT = 1 << 20


class WireError(Exception):
    """The other end does not speak this protocol, or has ended in the middle of a sentence."""


def request(environment: Mapping[str, str], stdin: bytes) -> bytes:
    """A request with those of `environment` that the CNI specification names. Raises WireError when it is too long."""
    block = b"".join(
        f"{name}={value}".encode("utf-8", "surrogateescape") + b"\0"
        for name, value in environment.items()
        if name.startswith("CNI_")
    )
    if len(block) > MAX_ENVIRONMENT or len(stdin) > MAX_STDIN:
        raise WireError(f"the request is too long: {len(block)} bytes of environment, {len(stdin)} of configuration")
    return MAGIC + len(block).to_bytes(4, "big") + len(stdin).to_bytes(4, "big") + block + stdin


def request_size(head: bytes) -> int:
    """How many bytes follow REQUEST_HEAD bytes of a request. Raises WireError."""
    environment, stdin = _lengths(head, REQUEST_HEAD, 2)
    if environment > MAX_ENVIRONMENT or stdin > MAX_STDIN:
        raise WireError("the request is too long")
    return environment + stdin


def read_request(head: bytes, rest: bytes) -> tuple[dict[str, str], bytes]:
    """(environment, stdin) of a request. Raises WireError."""
    length = _lengths(head, REQUEST_HEAD, 2)[0]
    variables = [item.decode("utf-8", "surrogateescape").partition("=") for item in rest[:length].split(b"\0") if item]
    return {name: value for name, _, value in variables}, rest[length:]


def words(text: str) -> bytes:
    """`text` for stderr, as bytes: whatever a path or an argument holds that is no UTF-8, this succeeds."""
    return text.encode("utf-8", "backslashreplace")


def told(lines: Iterable[str]) -> bytes:
    """What an operator should see, for stderr."""
    return words("".join(f"interceptor-cni: {line}\n" for line in lines))


def answer(status: int, stdout: bytes, stderr: bytes) -> bytes:
    """The agent's answer."""
    lengths = (status, len(stdout), len(stderr))
    return MAGIC + b"".join(number.to_bytes(4, "big") for number in lengths) + stdout + stderr


def answer_size(head: bytes) -> int:
    """How many bytes follow ANSWER_HEAD bytes of an answer. Raises WireError."""
    _, stdout, stderr = _lengths(head, ANSWER_HEAD, 3)
    return stdout + stderr


def read_answer(head: bytes, rest: bytes) -> tuple[int, bytes, bytes]:
    """(exit status, stdout, stderr) of an answer. Raises WireError."""
    status, stdout, _ = _lengths(head, ANSWER_HEAD, 3)
    return status, rest[:stdout], rest[stdout:]


def _lengths(head: bytes, size: int, count: int) -> list[int]:
    if len(head) != size or not head.startswith(MAGIC):
        raise WireError("not the node agent's protocol, or another version of it")
    start = len(MAGIC)
    return [int.from_bytes(head[start + 4 * index : start + 4 * index + 4], "big") for index in range(count)]
