"""The backend for images that have no iptables program: the same text, taken by python-iptables in a child process.

Writes legacy tables, like iptables-legacy. python-iptables itself is imported by libiptc_worker.py alone.
"""

from __future__ import annotations

import json
import sys

from interceptor.backends import hints, process
from interceptor.backends.iptables import LOCK_WAIT_S, IptablesBackend
from interceptor.errors import BackendError
from interceptor.values import Family

NAME = "libiptc"
# -I: what lies in the caller's directory or PYTHONPATH is not to run as root.
WORKER = ("-I", "-m", "interceptor.backends.libiptc_worker")
EXISTING = {Family.V4: "/proc/thread-self/net/ip_tables_names", Family.V6: "/proc/thread-self/net/ip6_tables_names"}


class Libiptc:
    """The Tool (backends/iptables.py) that asks a worker."""

    def save(self, family: Family) -> str:
        """iptables-save text of what is ours."""
        return _ask("save", family) if _has_tables(family) else ""

    def restore(self, family: Family, text: str) -> None:
        """What iptables-restore --noflush does."""
        _ask("restore", family, text)

    def tidy(self, family: Family) -> bool:  # noqa: ARG002
        """Nothing: only the kernel takes legacy tables away."""
        return False


class LibiptcBackend(IptablesBackend):
    """IptablesBackend with that Tool."""

    def __init__(self) -> None:
        super().__init__("legacy", Libiptc(), NAME)


def _has_tables(family: Family) -> bool:
    # Saves a child that would cost 400 ms.
    try:
        with open(EXISTING[family], encoding="ascii") as names:
            return bool(names.read().strip())
    except OSError:
        return False


def _ask(verb: str, family: Family, text: str = "") -> str:
    request = json.dumps({"verb": verb, "family": family.value, "text": text})
    doing = f"{'listing' if verb == 'save' else 'loading'} IP{family.value} rules by python-iptables"
    printed = process.run_checked(
        [sys.executable, *WORKER], stdin=request, doing=doing, timeout_s=LOCK_WAIT_S + process.TIMEOUT_S
    )
    try:
        answer = json.loads(printed)
    except ValueError as error:
        raise BackendError(f"{doing}: the worker's answer is not JSON: {printed[:200]!r}") from error
    if "error" in answer:
        raise hints.explained(doing, "python-iptables", 1, answer["error"])
    return str(answer["text"])
