"""What the load generators and the server print, as numbers. No I/O."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Requests:
    """A wrk run; `errors` are of sockets, timeouts, and answers that were not 2xx or 3xx."""

    count: int
    duration_s: float
    p50_s: float
    p99_s: float
    errors: int


def wrk(text: str) -> Requests:
    """The output of `wrk --latency`. Raises ValueError when it is not that."""
    total = re.search(r"(\d+) requests in ([\d.]+)(us|ms|s|m|h),", text)
    if total is None:
        raise ValueError(f"not the output of wrk --latency: {text[:300]!r}")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return Requests(
        count=int(total.group(1)),
        duration_s=float(total.group(2)) * _UNIT_S[total.group(3)],
        p50_s=_percentile(text, 50),
        p99_s=_percentile(text, 99),
        errors=(sum(map(int, errors.groups())) if errors else 0) + (int(refused.group(1)) if refused else 0),
    )


def _percentile(text: str, which: int) -> float:
    found = re.search(rf"^\s+{which}%\s+([\d.]+)(us|ms|s|m|h) *$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no {which}% line in {text[:300]!r}")
    return float(found.group(1)) * _UNIT_S[found.group(2)]


@dataclass(frozen=True, slots=True)
class Transfer:
    """An iperf3 run: what arrived at the receiver."""

    received_bytes: int
    duration_s: float


def iperf3(text: str) -> Transfer:
    """The output of `iperf3 --json`. Raises ValueError with iperf3's own words when the run failed."""
    document = json.loads(text)
    if "error" in document:
        raise ValueError(f"iperf3: {document['error']}")
    received = document["end"]["sum_received"]
    return Transfer(int(received["bytes"]), float(received["seconds"]))


def nginx_accepted(text: str) -> int:
    """Connections accepted so far, from an answer of nginx's stub_status. Raises ValueError when it is not that."""
    found = re.search(r"^server accepts handled requests\s+(\d+) ", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"not an answer of stub_status: {text[:300]!r}")
    return int(found.group(1))
