"""What the proxy counts: one table of metrics, a cell for each of their label values, a row of cells for each worker process.

Counting is `cells[index] += 1` on shared memory; no lock, since each row has one writer. Knows nothing of text: exposition.py.
"""

from __future__ import annotations

import itertools
import math
import mmap
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal, TypeAlias

# A label value that is not in the table is counted under this one where the metric has it: a peer cannot make series grow.
OTHER = "other"
CELL_SIZE = 8
SECOND_US = 1_000_000

# Seconds. A connect within the node takes 0.1 ms, to the other end of the world 0.3 s; 1, 3 and 7 s are SYNs sent again.
CONNECT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0, 7.0, 10.0)
# From a request on a connection of its own to a connection kept for hours.
DURATION_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)

# A histogram's cells: one for each bucket, one for what is above them, then the sum in microseconds.
CONNECT_SUM = len(CONNECT_BUCKETS) + 1
DURATION_SUM = len(DURATION_BUCKETS) + 1

DIRECTIONS = ("outbound", "inbound", "dns")
MODES = ("redirect", "tproxy", "connect", OTHER)
FAILURES = (
    *("client_failed", "upstream_failed", "connect_failed", "connect_timeout", "idle_timeout", "drained", "worker_died"),
    OTHER,
)
REFUSALS = (
    *(
        "direct_dial",
        "no_conntrack_entry",
        "no_map_entry",
        "client_gone",
        "original_dst_failed",
        "no_original_dst",
        "no_resolver",
    ),
    *("too_many_connections", "too_many_connections_of_client", "too_many_udp_flows", "udp_upstream_failed"),
    *("too_many_dns_queries", "too_many_dns_connections", "dns_from_elsewhere", "dns_loop", "dns_malformed"),
    OTHER,
)
ACCEPT_ERRNOS = ("ECONNABORTED", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "EPROTO", OTHER)
RELAYS = ("copy", "splice", "packet", OTHER)
# Why a flow was not spliced packet by packet: relay/packet_layout.py, REFUSALS.
FALLBACKS = (
    *("no_handshake", "timestamps", "ecn", "mss", "early_data", "route", "map_full", "no_entry", "proxy_protocol"),
    OTHER,
)
DNS_OUTCOMES = ("answered", "cached", "malformed", "no_answer", "upstream_failed", "client_failed", "drained", OTHER)

Labels: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of METRICS. Its cells begin at `first`, one group for each combination of label values, in their order.

    A counter's group is one cell; a histogram's is a cell for each bucket, one for what is above them, and the sum in
    microseconds.
    """

    kind: Literal["counter", "histogram"]
    name: str
    help: str
    labels: Labels
    buckets: tuple[float, ...]
    first: int

    @property
    def group_size(self) -> int:
        """Cells a combination of label values."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """All combinations of label values, in the order of their cells."""
        return list(itertools.product(*(values for _, values in self.labels)))

    @property
    def end(self) -> int:
        """The index after its last cell."""
        return self.first + self.group_size * math.prod(len(values) for _, values in self.labels)

    def cell(self, *values: str) -> int:
        """The index of the first cell for these label values; one that is unknown counts as OTHER.

        Look it up once and keep it. Raises ValueError for a value that is unknown where there is no OTHER.
        """
        index = 0
        for value, (label, known) in zip(values, self.labels, strict=True):
            counted_as = value if value in known else OTHER
            if counted_as not in known:
                raise ValueError(f"{self.name} has no {label} {value!r}")
            index = index * len(known) + known.index(counted_as)
        return self.first + index * self.group_size


METRICS: list[Metric] = []


def _metric(kind: Literal["counter", "histogram"], name: str, text: str, labels: Labels, buckets: tuple[float, ...]) -> Metric:
    made = Metric(kind, name, text, labels, buckets, METRICS[-1].end if METRICS else 0)
    METRICS.append(made)
    return made


def _counter(name: str, text: str, **labels: tuple[str, ...]) -> Metric:
    return _metric("counter", name, text, tuple(labels.items()), ())


def _histogram(name: str, text: str, buckets: tuple[float, ...], **labels: tuple[str, ...]) -> Metric:
    return _metric("histogram", name, text, tuple(labels.items()), buckets)


OPENED = _counter(
    "interceptor_connections_opened_total", "TCP connections taken to be forwarded.", direction=DIRECTIONS, mode=MODES
)
CLOSED = _counter(
    "interceptor_connections_closed_total", "TCP connections ended, in whatever way.", direction=DIRECTIONS, mode=MODES
)
FAILED = _counter(
    "interceptor_connections_failed_total",
    "TCP connections that ended otherwise than by both sides' end of stream.",
    direction=DIRECTIONS,
    reason=FAILURES,
)
REFUSED = _counter(
    "interceptor_connections_refused_total", "Connections and datagrams accepted and not forwarded.", reason=REFUSALS
)
ACCEPT_ERRORS = _counter("interceptor_accept_errors_total", "accept() that failed.", errno=ACCEPT_ERRNOS)
SENT = _counter("interceptor_sent_bytes_total", "Bytes forwarded from clients to their destinations.", direction=DIRECTIONS)
RECEIVED = _counter(
    "interceptor_received_bytes_total", "Bytes forwarded from destinations to their clients.", direction=DIRECTIONS
)
CONNECT_TIME = _histogram(
    "interceptor_connect_duration_seconds",
    "From dialling the destination to its SYN-ACK.",
    CONNECT_BUCKETS,
    direction=DIRECTIONS,
)
OPEN_TIME = _histogram(
    "interceptor_open_duration_seconds", "From accept to the first byte that can move.", CONNECT_BUCKETS, direction=DIRECTIONS
)
DURATION = _histogram(
    "interceptor_connection_duration_seconds",
    "From accept to the end of the connection.",
    DURATION_BUCKETS,
    direction=DIRECTIONS,
)
RELAYS_STARTED = _counter("interceptor_relays_started_total", "Relays started, by how they move bytes.", relay=RELAYS)
RELAYS_ENDED = _counter("interceptor_relays_ended_total", "Relays ended, by how they moved bytes.", relay=RELAYS)
FALLBACKS_MADE = _counter(
    "interceptor_relay_fallbacks_total", "Connections that a faster relay could not take, by why not.", reason=FALLBACKS
)
ADOPTED = _counter("interceptor_connections_adopted_total", "Connections taken over from a proxy or worker that had ended.")
RECORDS_WRITTEN = _counter("interceptor_flow_records_written_total", "Lines written to the flow log.")
RECORDS_LOST = _counter(
    "interceptor_flow_records_lost_total",
    "Flow records lost: not_read, the reader was too slow; not_written, the kernel refused.",
    reason=("not_read", "not_written"),
)
DNS_QUERIES = _counter("interceptor_dns_queries_total", "DNS queries, by what became of them.", outcome=DNS_OUTCOMES)
UDP_OPENED = _counter("interceptor_udp_flows_opened_total", "UDP flows begun.", direction=DIRECTIONS)
UDP_CLOSED = _counter("interceptor_udp_flows_closed_total", "UDP flows ended, most of them by silence.", direction=DIRECTIONS)
WORKER_RESTARTS = _counter("interceptor_worker_restarts_total", "Worker processes that died and were started again.")

OWNERS_SKIPPED = _counter(
    "interceptor_owner_lookups_skipped_total",
    "Connections without a uid in their record, as there were too many to look them all up.",
)

ROW_CELLS = METRICS[-1].end

# name, help, what raises it, what lowers it: gauges that are the difference of two counters, so that nothing is counted twice.
GAUGES = (
    ("interceptor_connections_open", "TCP connections being forwarded.", OPENED, CLOSED),
    ("interceptor_udp_flows_open", "UDP flows that were not silent for long.", UDP_OPENED, UDP_CLOSED),
    ("interceptor_relays_running", "Relays at work, by how they move bytes.", RELAYS_STARTED, RELAYS_ENDED),
)


class Region:
    """The rows of all workers, and one more for the process that starts them, in memory that its children share.

    A 64-bit cell is stored in one instruction, so a reader sees the old or the new value, never half of each.
    """

    def __init__(self, workers: int = 1) -> None:
        self._rows = workers + 1
        self._memory = mmap.mmap(-1, self._rows * ROW_CELLS * CELL_SIZE)
        self._cells = memoryview(self._memory).cast("q")

    def worker(self, number: int) -> Counts:
        """The counts of worker `number`, from 0; a worker that takes another's place goes on with its row."""
        return self._row(number)

    @property
    def parent(self) -> Counts:
        """The counts of the process that starts workers."""
        return self._row(self._rows - 1)

    def totals(self) -> list[int]:
        """Each cell's sum over all rows."""
        cells = self._cells.tolist()
        return [sum(cells[index::ROW_CELLS]) for index in range(ROW_CELLS)]

    def worker_ended(self, number: int) -> int:
        """Close in the books what a worker's end has closed in the kernel; how many connections those were."""
        cells = self._row(number).cells
        died = 0
        for _, _, raised, lowered in GAUGES:
            for values in raised.combinations:
                lost = cells[raised.cell(*values)] - cells[lowered.cell(*values)]
                cells[lowered.cell(*values)] += lost
                if raised is OPENED:
                    cells[FAILED.cell(values[0], "worker_died")] += lost
                    died += lost
        return died

    def worker_replaced(self) -> None:
        """Count a worker that is started in the place of one that died."""
        self.parent.add(WORKER_RESTARTS)

    def _row(self, number: int) -> Counts:
        return Counts(self._cells[number * ROW_CELLS : (number + 1) * ROW_CELLS])


class Counts:
    """One process's cells. What happens for every connection keeps its index and adds to `cells`; the rest calls `add`."""

    __slots__ = ("cells",)

    def __init__(self, cells: memoryview[int]) -> None:
        self.cells = cells

    def add(self, metric: Metric, *values: str, count: int = 1) -> None:
        """Count `count` more under these label values."""
        self.cells[metric.cell(*values)] += count

    def value(self, metric: Metric, *values: str) -> int:
        """What was counted under these label values: a counter's value, or the number in a histogram's first bucket."""
        return self.cells[metric.cell(*values)]


class ListenerCounts:
    """What is counted for every connection of one listener, all indexes looked up; few calls, each of which does several."""

    __slots__ = (
        *("_cells", "_closed", "_connect", "_duration", "_ended", "_failed", "_open", "_opened", "_owners_skipped"),
        *("_received", "_sent", "_started"),
    )

    def __init__(self, counts: Counts, direction: str, mode: str) -> None:
        self._cells = counts.cells
        self._opened = OPENED.cell(direction, mode)
        self._closed = CLOSED.cell(direction, mode)
        self._sent = SENT.cell(direction)
        self._received = RECEIVED.cell(direction)
        self._failed = {reason: FAILED.cell(direction, reason) for reason in FAILURES}
        self._connect = CONNECT_TIME.cell(direction)
        self._open = OPEN_TIME.cell(direction)
        self._duration = DURATION.cell(direction)
        self._owners_skipped = OWNERS_SKIPPED.cell()
        self._started = {relay: RELAYS_STARTED.cell(relay) for relay in RELAYS}
        self._ended = {relay: RELAYS_ENDED.cell(relay) for relay in RELAYS}

    def opened(self) -> None:
        """A connection was taken."""
        self._cells[self._opened] += 1

    def owner_skipped(self) -> None:
        """There was no time to ask whose it is."""
        self._cells[self._owners_skipped] += 1

    def connected(self, connect_s: float, open_s: float) -> None:
        """Its upstream is there: `connect_s` after dialling, `open_s` after accept."""
        cells, connect, opened = self._cells, self._connect, self._open
        cells[connect + bisect_left(CONNECT_BUCKETS, connect_s)] += 1
        cells[connect + CONNECT_SUM] += int(connect_s * SECOND_US)
        cells[opened + bisect_left(CONNECT_BUCKETS, open_s)] += 1
        cells[opened + CONNECT_SUM] += int(open_s * SECOND_US)

    def relaying(self, relay: str) -> None:
        """A relay has begun to move its bytes."""
        self._cells[self._started[relay if relay in RELAYS else OTHER]] += 1

    def relayed(self, relay: str, sent: int, received: int) -> None:
        """That relay has ended, and so many bytes more were forwarded."""
        cells = self._cells
        cells[self._ended[relay if relay in RELAYS else OTHER]] += 1
        cells[self._sent] += sent
        cells[self._received] += received

    def moved(self, sent: int, received: int) -> None:
        """So many bytes more were forwarded: for a long connection, now and then."""
        cells = self._cells
        cells[self._sent] += sent
        cells[self._received] += received

    def closed(self, reason: str, duration_s: float) -> None:
        """It ended, `duration_s` after accept; `reason` as in the flow record."""
        cells, duration = self._cells, self._duration
        cells[self._closed] += 1
        cells[duration + bisect_left(DURATION_BUCKETS, duration_s)] += 1
        cells[duration + DURATION_SUM] += int(duration_s * SECOND_US)
        if reason != "closed":
            cells[self._failed[reason if reason in FAILURES else OTHER]] += 1


def summary(totals: list[int]) -> dict[str, int | dict[str, int]]:
    """The counts that are not zero, for people: `{"connections_opened": 3, "connections_refused": {"direct_dial": 1}}`."""
    shown: dict[str, int | dict[str, int]] = {}
    for metric in METRICS:
        if metric.kind == "histogram":
            continue
        name = metric.name.removeprefix("interceptor_").removesuffix("_total")
        by_label: dict[str, int] = {}
        for values in metric.combinations:
            count = totals[metric.cell(*values)]
            if count:
                key = values[-1] if metric.labels and metric.labels[-1][0] in ("reason", "errno", "relay", "outcome") else ""
                by_label[key] = by_label.get(key, 0) + count
        if by_label:
            shown[name] = by_label.get("", by_label)
    return shown
