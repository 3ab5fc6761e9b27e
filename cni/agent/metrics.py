"""What the agent counts, from any thread. How it is written is exposition's business."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from cni import protocol
from interceptor.proxy.exposition import Family, Sample

# Seconds. An ADD takes 5 ms when nothing is in its way; a lock that is held or an API that is slow makes it seconds.
BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
REASONS = {
    protocol.INCOMPATIBLE_VERSION: "version",
    protocol.INVALID_ENVIRONMENT: "environment",
    protocol.DECODING: "decoding",
    protocol.INVALID_CONFIG: "config",
    protocol.INVALID_NETNS: "netns",
    protocol.TRY_AGAIN_LATER: "try_again_later",
    protocol.NOT_AVAILABLE: "not_available",
    protocol.INTERNAL: "internal",
    protocol.CAPTURE_FAILED: "capture_failed",
    protocol.UNSUPPORTED_HOST: "unsupported_host",
    protocol.DRIFTED: "drifted",
}
OTHER = "other"
COMMANDS = ("ADD", "CHECK", "DEL", "GC", "STATUS")
REPAIRS = ("healed", "labelled", "deleted", "failed")


class Metrics:
    """Counts of requests, failures and repairs, and how long requests took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str]] = Counter({(name, end): 0 for name in COMMANDS for end in ("ok", "failed")})
        self._failures: Counter[tuple[str, str]] = Counter({("ADD", reason): 0 for reason in REASONS.values()})
        self._durations = {name: [0] * (len(BUCKETS) + 1) for name in COMMANDS}
        self._seconds = dict.fromkeys(COMMANDS, 0.0)
        self._repairs: Counter[str] = Counter(dict.fromkeys(REPAIRS, 0))
        self._refused = 0

    def request(self, command: str, code: int, seconds: float) -> None:
        """A request was answered; `code` is the error object's, 0 for success."""
        name = command if command in COMMANDS else OTHER
        with self._lock:
            self._requests[name, "failed" if code else "ok"] += 1
            if code:
                self._failures[name, REASONS.get(code, OTHER)] += 1
            if name in self._durations:
                self._durations[name][bisect_left(BUCKETS, seconds)] += 1
                self._seconds[name] += seconds

    def refused(self) -> None:
        """Somebody connected who was not answered: not root, or not this protocol."""
        with self._lock:
            self._refused += 1

    def repair(self, result: str) -> None:
        """One of REPAIRS."""
        with self._lock:
            self._repairs[result] += 1

    def families(self) -> Iterator[Family]:
        """All of it, as of one moment."""
        with self._lock:
            requests = [Sample(count, (("command", name), ("result", end))) for (name, end), count in self._requests.items()]
            failures = [Sample(count, (("command", name), ("reason", why))) for (name, why), count in self._failures.items()]
            durations = list(self._histogram())
            repairs = [Sample(count, (("result", result),)) for result, count in self._repairs.items()]
            refused = [Sample(self._refused)]
        yield Family("interceptor_cni_requests_total", "counter", "Requests answered, by command and result.", requests)
        yield Family("interceptor_cni_failures_total", "counter", "Requests answered with an error, by reason.", failures)
        yield Family(
            "interceptor_cni_request_duration_seconds", "histogram", "From request to answer, in the agent.", durations
        )
        yield Family("interceptor_cni_repairs_total", "counter", "Pods found without their rules, by what was done.", repairs)
        yield Family("interceptor_cni_refused_total", "counter", "Connections that were not root's, or not a shim's.", refused)

    def _histogram(self) -> Iterator[Sample]:
        for name, counts in self._durations.items():
            labels = (("command", name),)
            below = 0
            for bound, count in zip((*map(repr, BUCKETS), "+Inf"), counts, strict=True):
                below += count
                yield Sample(below, (*labels, ("le", bound)), "_bucket")
            yield Sample(self._seconds[name], labels, "_sum")
            yield Sample(below, labels, "_count")
