"""The flow log: every record a whole line, whatever the reader does; and the record's JSON against json.loads."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.proxy import flow_log
from interceptor.proxy.flow_log import PIPE_BUF, FlowLog, chunks
from interceptor.proxy.flows import Flow
from interceptor.proxy.metrics import RECORDS_LOST, RECORDS_WRITTEN, Counts, Region
from interceptor.proxy.settings import Listener

DEADLINE_S = 10.0
LISTENER = Listener("outbound", "redirect", 15001, "v4")
CLIENT, SERVER = ("10.0.0.1", 40000), ("2001:db8::2", 443, 0, 0)


@dataclass(frozen=True)
class Line:
    """A record that is its own text."""

    text: str

    def to_json(self) -> str:
        return self.text


@contextmanager
def logging_to(descriptor: int) -> Iterator[tuple[FlowLog, Counts]]:
    counts = Region().worker(0)
    log = FlowLog(descriptor, counts)
    try:
        yield log, counts
    finally:
        log.close()


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def flow(**fields: Any) -> Flow:
    return Flow(0.0, "tcp", "outbound", LISTENER, CLIENT, SERVER, None, 1, 2, 3.0, "closed")._replace(**fields)


def test_records_come_in_order_as_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open(path, "wb") as file, logging_to(file.fileno()) as (log, counts):
        for number in range(5000):
            log.write(Line(str(number)))
        log.close()
        assert counts.value(RECORDS_WRITTEN) == 5000
    assert path.read_text().splitlines() == [str(number) for number in range(5000)]


def test_a_record_does_not_wait_for_the_next() -> None:
    with pipe() as (reading, writing), logging_to(writing) as (log, _):
        log.write(Line("alone"))
        assert select.select([reading], [], [], DEADLINE_S)[0]
        assert os.read(reading, 100) == b"alone\n"


def test_two_writers_of_one_pipe_do_not_mix_their_lines() -> None:
    lines = [str(writer) * 300 for writer in range(2)]
    with pipe() as (reading, writing), logging_to(writing) as (one, _), logging_to(writing) as (other, _):
        for _ in range(3000):
            one.write(Line(lines[0]))
            other.write(Line(lines[1]))
        received = b""
        while received.count(b"\n") < 6000:
            received += os.read(reading, 65536)
    assert sorted(received.decode().splitlines()) == [lines[0]] * 3000 + [lines[1]] * 3000


def test_a_reader_that_is_stuck_costs_records_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_log, "LIMIT", 10)
    monkeypatch.setattr(flow_log, "CLOSE_S", 0.05)
    with pipe() as (reading, writing):
        os.set_blocking(writing, False)
        filled = 0
        try:
            while True:
                filled += os.write(writing, b"." * PIPE_BUF)
        except BlockingIOError:
            os.set_blocking(writing, True)
        counts = Region().worker(0)
        log = FlowLog(writing, counts)
        for number in range(1000):
            log.write(Line(str(number)))
        assert counts.value(RECORDS_LOST, "not_read") >= 1000 - 2 * 10
        log.close()
        # The thread still hangs in write(2): let it go.
        while filled > 0:
            filled -= len(os.read(reading, 65536))
        log._thread.join(DEADLINE_S)


def test_a_full_disk_costs_records_that_are_counted_and_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with logging_to(full) as (log, counts):
        for burst in range(2):
            log.write(Line("a"))
            log.write(Line("b"))
            until(lambda burst=burst: counts.value(RECORDS_LOST, "not_written") == 2 * (burst + 1))  # type: ignore[misc]
        log.close()
        assert counts.value(RECORDS_WRITTEN) == 0
    os.close(full)
    assert capfd.readouterr().err.count("No space left on device") == 1


def test_a_torn_line_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "log"
    write, calls = os.write, []

    def failing(descriptor: int, content: bytes) -> int:
        calls.append(content)
        if len(calls) == 1:
            return write(descriptor, content[:7])  # "first", its newline, and a byte of "second"
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    with open(path, "wb") as file, logging_to(file.fileno()) as (log, counts):
        with monkeypatch.context() as patch:
            patch.setattr(flow_log.os, "write", failing)
            log.write(Line("first"))
            log.write(Line("second"))
            until(lambda: counts.value(RECORDS_LOST, "not_written") == 1)
            log.write(Line("third"))
            log.close()
        assert counts.value(RECORDS_WRITTEN) == 2
    assert path.read_text() == "first\ns\nthird\n"


def test_a_non_blocking_descriptor_is_waited_for() -> None:
    with pipe() as (reading, writing):
        os.set_blocking(writing, False)
        with logging_to(writing) as (log, counts):
            for _ in range(2000):
                log.write(Line("x" * 99))
            received = 0
            while received < 200_000:
                received += len(os.read(reading, 65536))
            log.close()
            assert counts.value(RECORDS_LOST, "not_written") == 0


@given(st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"") + b"\n")), st.integers(1, 100))
def test_chunks_are_whole_lines_within_the_limit(lines: list[bytes], limit: int) -> None:
    made = list(chunks(lines, limit))

    assert b"".join(chunk for chunk, _ in made) == b"".join(lines)
    assert all(chunk.endswith(b"\n") and chunk.count(b"\n") == count for chunk, count in made)
    assert all(len(chunk) <= limit or count == 1 for chunk, count in made)


TEXT = st.none() | st.text()
NUMBER = st.none() | st.integers(0, 2**63)


@given(
    st.fixed_dictionaries(
        {name: TEXT for name in ("error", "command", "relay", "fallback", "sni", "alpn", "host", "dns_name")}
    ),
    NUMBER,
)
def test_any_text_survives_the_hand_written_json(texts: dict[str, str | None], number: int | None) -> None:
    line = flow(**texts, uid=number, pid=number).to_json().encode("utf-8", "backslashreplace").decode()

    read = json.loads(line)
    assert "\n" not in line
    assert {name: read[name] for name in texts} == texts
    assert (read["uid"], read["pid"]) == (number, number)


@given(st.floats(0, 1e15), st.integers(0, 2**63))
def test_numbers_are_json_numbers(milliseconds: float, count: int) -> None:
    read = json.loads(flow(duration_ms=milliseconds, connect_ms=milliseconds, sent=count, received=count).to_json())

    assert read["duration_ms"] == read["connect_ms"] == pytest.approx(milliseconds, abs=0.001)
    assert read["bytes_sent"] == read["bytes_received"] == count


def test_a_record_has_these_fields() -> None:
    assert json.loads(flow(upstream_local=CLIENT, connect_ms=0.1239, original_dst=None).to_json()) == {
        "time": "1970-01-01T00:00:00.000Z",
        "protocol": "tcp",
        "direction": "outbound",
        "listener": "outbound redirect 15001/v4",
        "client": "10.0.0.1:40000",
        "original_dst": None,
        "upstream_local": "10.0.0.1:40000",
        "bytes_sent": 1,
        "bytes_received": 2,
        "duration_ms": 3.0,
        "connect_ms": 0.124,
        "reason": "closed",
        "error": None,
        "uid": None,
        "pid": None,
        "command": None,
        "relay": None,
        "fallback": None,
        "sni": None,
        "alpn": None,
        "host": None,
        "dns_name": None,
        "dns": None,
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1795341600.9996, "2026-11-22T10:00:01.000Z"),
        (1795341600.1234, "2026-11-22T10:00:00.123Z"),
    ],
)
def test_times_are_rounded_to_the_millisecond(seconds: float, text: str) -> None:
    assert json.loads(flow(time=seconds).to_json())["time"] == text
