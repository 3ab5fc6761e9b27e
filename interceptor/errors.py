"""What can go wrong, by whose fault it is. Raised deep, caught at the two edges: `cli` and `cni/plugin.py`.

The exit codes are documented in docs/exit-codes.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class InterceptorError(Exception):
    """The base of all errors of ours; its text is one line an operator can act on."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One malformed input: which option (with its source), which value, and what would be right."""

    option: str
    value: str
    expected: str

    def __str__(self) -> str:
        text = f"{self.option}: {self.value!r}: {self.expected}"
        # A file's keys and its name are others' text: no new line, nothing that a terminal obeys.
        return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class ConfigError(InterceptorError):
    """The configuration cannot be used. Carries every problem found, never only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class NetnsError(InterceptorError):
    """The network namespace is missing, is no network namespace, or is one we must not touch."""

    exit_code = 4


class BackendError(InterceptorError):
    """The kernel, or the program that talks to it, refused. Kernel state is unchanged unless the text says otherwise."""

    exit_code = 5


class Unsupported(InterceptorError):
    """This host or kernel lacks something that the configuration needs."""

    exit_code = 6


class ProxyError(InterceptorError):
    """The proxy cannot start: a port is taken, a capability is missing."""

    exit_code = 7
