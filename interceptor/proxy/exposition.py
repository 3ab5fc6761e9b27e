"""Counts as Prometheus text (format 0.0.4). Knows the format; not what is counted, who reads it or over what.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/; the escapes are those of OpenMetrics 1.0 too.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from interceptor import __version__
from interceptor.proxy.metrics import GAUGES, METRICS, SECOND_US, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Pairs: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: the metric's name with this suffix, these labels, this value."""

    value: float
    labels: Pairs = ()
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all its samples."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[Sample]


def render(families: Iterable[Family]) -> bytes:
    """The families as one document."""
    lines: list[str] = []
    for family in families:
        lines.append(f"# HELP {family.name} {escaped_help(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines += (f"{family.name}{sample.suffix}{_labels(sample.labels)} {_number(sample.value)}" for sample in family.samples)
    return ("\n".join(lines) + "\n").encode()


def escaped_help(text: str) -> str:
    """A help text on one line."""
    return text.replace("\\", r"\\").replace("\n", r"\n")


def escaped(value: str) -> str:
    """A label value as it stands between quotes."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _labels(pairs: Pairs) -> str:
    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in pairs) + "}" if pairs else ""


def _number(value: float) -> str:
    return repr(value)


def counted(totals: Sequence[int]) -> Iterator[Family]:
    """The families of metrics.METRICS and metrics.GAUGES from the sum of all rows (metrics.Region.totals).

    A counter with an `other` that was never met leaves that sample out; the rest is there from the start, at 0, so that a
    rate over the first event is right.
    """
    for metric in METRICS:
        samples = _histogram(metric, totals) if metric.kind == "histogram" else _counter(metric, totals)
        yield Family(metric.name, metric.kind, metric.help, list(samples))
    for name, text, raised, lowered in GAUGES:
        gauge = [
            # The two sums were not read at one instant: a connection that came and went between them is no minus one.
            Sample(max(0, up.value - totals[lowered.cell(*(value for _, value in up.labels))]), up.labels)
            for up in _counter(raised, totals)
        ]
        yield Family(name, "gauge", text, gauge)


def _counter(metric: Metric, totals: Sequence[int]) -> Iterator[Sample]:
    for index, labels in enumerate(_combinations(metric), metric.first):
        if totals[index] or all(value != "other" for _, value in labels):
            yield Sample(totals[index], labels)


def _histogram(metric: Metric, totals: Sequence[int]) -> Iterator[Sample]:
    size = metric.group_size
    for number, labels in enumerate(_combinations(metric)):
        *counts, total_us = totals[metric.first + number * size : metric.first + (number + 1) * size]
        below = list(itertools.accumulate(counts))
        for bound, count in zip(metric.buckets, below, strict=False):
            yield Sample(count, (*labels, ("le", repr(bound))), "_bucket")
        yield Sample(below[-1], (*labels, ("le", "+Inf")), "_bucket")
        yield Sample(total_us / SECOND_US, labels, "_sum")
        yield Sample(below[-1], labels, "_count")


def _combinations(metric: Metric) -> Iterator[Pairs]:
    names = [name for name, _ in metric.labels]
    for values in metric.combinations:
        yield tuple(zip(names, values, strict=True))


def process() -> Iterator[Family]:
    """This process's own figures, under the names that Prometheus client libraries give them."""
    found = _read_process("self")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _gauge("process_open_fds", "Number of open file descriptors.", len(os.listdir("/proc/self/fd")) - 1)
    yield _gauge("process_max_fds", "Maximum number of open file descriptors.", limit)
    yield _gauge("process_resident_memory_bytes", "Resident memory size in bytes.", found.resident)
    yield _gauge("process_start_time_seconds", "Start time in seconds since the epoch.", _boot_time() + found.started_s)
    yield Family("process_cpu_seconds_total", "counter", "User and system CPU time spent in seconds.", [Sample(found.cpu_s)])


def workers(pids: Mapping[int, int]) -> Iterator[Family]:
    """Figures of the worker processes `pids` (number -> pid), without those that are gone meanwhile, or not to be seen."""
    cpu, resident, descriptors = [], [], []
    for number, pid in pids.items():
        labels = (("worker", str(number)),)
        with suppress(OSError):
            found = _read_process(str(pid))
            cpu.append(Sample(found.cpu_s, labels))
            resident.append(Sample(found.resident, labels))
            descriptors.append(Sample(len(os.listdir(f"/proc/{pid}/fd")), labels))
    if pids:
        yield Family("interceptor_worker_cpu_seconds_total", "counter", "User and system CPU time spent in seconds.", cpu)
        yield Family("interceptor_worker_resident_memory_bytes", "gauge", "Resident memory size in bytes.", resident)
        yield Family("interceptor_worker_open_fds", "gauge", "Number of open file descriptors.", descriptors)


class _Process(NamedTuple):
    cpu_s: float
    resident: int  # bytes
    started_s: float  # after boot


def _read_process(name: str) -> _Process:
    # Bytes: a codec would be imported now, and the user that the proxy has become may not be let into Python's directory.
    with open(f"/proc/{name}/stat", "rb") as file:
        # proc(5): the name in parentheses may hold anything; after it the fields are numbers.
        fields = file.read().rpartition(b")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    cpu_s = (int(fields[11]) + int(fields[12])) / ticks
    return _Process(cpu_s, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), int(fields[19]) / ticks)


def build() -> Family:
    """Which program this is."""
    python = ".".join(map(str, sys.version_info[:3]))
    labels = (("version", __version__), ("python", python))
    return Family("interceptor_build_info", "gauge", "Always 1; what was built is in the labels.", [Sample(1, labels)])


def _gauge(name: str, text: str, value: float) -> Family:
    return Family(name, "gauge", text, [Sample(value)])


def _boot_time() -> int:
    with open("/proc/stat", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(b"btime "))
