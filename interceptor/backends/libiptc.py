"""The backend for images that have no iptables program: the same text, taken by python-iptables in a child process a family.

Writes legacy tables, like iptables-legacy. python-iptables itself is imported by libiptc_worker.py alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from interceptor.backends import hints, process
from interceptor.backends.iptables import HAS_V6, LOCK_WAIT_S, IptablesBackend
from interceptor.errors import BackendError
from interceptor.values import Family

NAME = "libiptc"
# -I: what lies in the caller's directory or PYTHONPATH is not to run as root.
WORKER = ("-I", "-m", "interceptor.backends.libiptc_worker")
# python-iptables imports distutils, for which setuptools, where it is installed, would import all of itself: 90 ms.
ENVIRONMENT = {"SETUPTOOLS_USE_DISTUTILS": "stdlib"}
EXISTING = {Family.V4: "/proc/thread-self/net/ip_tables_names", Family.V6: "/proc/thread-self/net/ip6_tables_names"}


class Libiptc:
    """The Tool (backends/iptables.py) that asks a worker a family; they live as long as opened() does."""

    def __init__(self) -> None:
        self._workers: dict[Family, process.Child] | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """See Tool."""
        if self._workers is not None:
            yield
            return
        self._workers = {}
        try:
            yield
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers = None

    def save(self, family: Family) -> str:
        """iptables-save text of what is ours."""
        return self._ask("save", family) if _has_tables(family) else ""

    def restore(self, family: Family, text: str) -> None:
        """What iptables-restore --noflush does."""
        self._ask("restore", family, text)

    def tidy(self, family: Family) -> bool:  # noqa: ARG002
        """Nothing: only the kernel takes legacy tables away."""
        return False

    def _ask(self, verb: str, family: Family, text: str = "") -> str:
        request = json.dumps({"verb": verb, "text": text})
        doing = f"{'listing' if verb == 'save' else 'loading'} IP{family.value} rules by python-iptables"
        with self.opened():
            printed = self._worker(family).ask(request, doing=doing, timeout_s=LOCK_WAIT_S + process.TIMEOUT_S)
        try:
            answer = json.loads(printed)
        except ValueError as error:
            raise BackendError(f"{doing}: the worker's answer is not JSON: {printed[:200]!r}") from error
        if "error" in answer:
            raise hints.explained(doing, "python-iptables", 1, answer["error"])
        return str(answer["text"])

    def _worker(self, family: Family) -> process.Child:
        assert self._workers is not None
        if not self._workers:
            # All at once: they take 0.2 s to start, side by side where there are two processors.
            for each in Family:
                if each is family or os.path.exists(HAS_V6):
                    self._workers[each] = process.Child([sys.executable, *WORKER, each.value], ENVIRONMENT)
        return self._workers[family]


class LibiptcBackend(IptablesBackend):
    """IptablesBackend with that Tool."""

    def __init__(self) -> None:
        super().__init__("legacy", Libiptc(), NAME)


def _has_tables(family: Family) -> bool:
    # Saves a child that would cost 0.2 s.
    try:
        with open(EXISTING[family], encoding="ascii") as names:
            return bool(names.read().strip())
    except OSError:
        return False
