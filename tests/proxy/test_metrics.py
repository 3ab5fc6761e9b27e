"""What is counted and how it is written, with prometheus_client's parser as the judge of the text."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from interceptor import __version__
from interceptor.proxy import metrics
from interceptor.proxy.exposition import Family, Sample, build, counted, process, render
from interceptor.proxy.metrics import METRICS, ListenerCounts, Region


def parsed(families: Iterable[Family]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample name, sorted labels) -> value, as prometheus_client reads what we write."""
    text = render(families).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(found) == len(samples), "a sample stands twice"
    return found


def test_a_connection_is_counted_from_its_opening_to_its_end() -> None:
    region = Region()
    listener = ListenerCounts(region.worker(0), "outbound", "redirect")
    listener.opened()
    listener.connected(0.003, 0.004)
    listener.moved(10, 2000)
    during = parsed(counted(region.totals()))
    listener.closed("upstream_failed", 20.0)
    after = parsed(counted(region.totals()))

    labels = (("direction", "outbound"), ("mode", "redirect"))
    direction = (("direction", "outbound"),)
    assert during["interceptor_connections_open", labels] == 1
    assert after["interceptor_connections_open", labels] == 0
    assert after["interceptor_connections_opened_total", labels] == after["interceptor_connections_closed_total", labels] == 1
    assert after["interceptor_connections_failed_total", (*direction, ("reason", "upstream_failed"))] == 1
    assert after["interceptor_sent_bytes_total", direction] == 10
    assert after["interceptor_received_bytes_total", direction] == 2000
    assert after["interceptor_connection_duration_seconds_sum", direction] == 20


def test_a_histogram_is_cumulative_and_complete() -> None:
    region = Region()
    listener = ListenerCounts(region.worker(0), "inbound", "redirect")
    for seconds in (0.0001, 0.0005, 0.002, 99.0):
        listener.connected(seconds, 0.3)

    found = parsed(counted(region.totals()))
    direction = ("direction", "inbound")
    assert found["interceptor_open_duration_seconds_sum", (direction,)] == pytest.approx(1.2)
    name = "interceptor_connect_duration_seconds"
    counts = {
        dict(labels)["le"]: value for (key, labels), value in found.items() if key == name + "_bucket" and direction in labels
    }
    assert (counts["0.0005"], counts["0.001"], counts["0.0025"], counts["10.0"], counts["+Inf"]) == (2, 2, 3, 3, 4)
    assert found[name + "_count", (direction,)] == 4
    assert found[name + "_sum", (direction,)] == pytest.approx(99.0026)


def test_an_unknown_label_value_counts_as_other() -> None:
    region = Region()
    region.worker(0).add(metrics.REFUSED, "no such reason")

    assert parsed(counted(region.totals()))["interceptor_connections_refused_total", (("reason", "other"),)] == 1


def test_an_unknown_label_value_without_other_is_an_error() -> None:
    with pytest.raises(ValueError, match="sideways"):
        Region().worker(0).add(metrics.SENT, "sideways")


def test_no_two_metrics_share_a_cell() -> None:
    cells = [cell for metric in METRICS for cell in range(metric.first, metric.end)]

    assert cells == list(range(metrics.ROW_CELLS))


def test_all_label_values_of_a_metric_have_their_own_cells() -> None:
    for metric in METRICS:
        firsts = [metric.cell(*values) for values in metric.combinations]
        assert firsts == list(range(metric.first, metric.end, metric.group_size))


def test_rows_of_worker_processes_are_summed() -> None:
    region = Region(workers=2)
    region.worker(0).add(metrics.OPENED, "inbound", "tproxy", count=3)
    child = os.fork()
    if child == 0:
        region.worker(1).add(metrics.OPENED, "inbound", "tproxy", count=4)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    labels = (("direction", "inbound"), ("mode", "tproxy"))
    assert parsed(counted(region.totals()))["interceptor_connections_opened_total", labels] == 7


def test_a_dead_worker_leaves_no_open_connections_behind() -> None:
    region = Region(workers=2)
    survivor, dead = (ListenerCounts(region.worker(number), "inbound", "tproxy") for number in (0, 1))
    for listener in (survivor, dead, dead):
        listener.opened()
    dead.closed("closed", 1.0)
    assert region.worker_ended(1) == 1
    region.worker_replaced()

    found = parsed(counted(region.totals()))
    assert found["interceptor_connections_open", (("direction", "inbound"), ("mode", "tproxy"))] == 1
    assert found["interceptor_connections_failed_total", (("direction", "inbound"), ("reason", "worker_died"))] == 1
    assert found["interceptor_worker_restarts_total", ()] == 1


def test_process_and_build_are_told() -> None:
    found = parsed([*process(), build()])

    assert found["process_resident_memory_bytes", ()] > 1_000_000
    assert 0 < found["process_open_fds", ()] <= found["process_max_fds", ()]
    assert found["process_cpu_seconds_total", ()] > 0
    assert any(name == "interceptor_build_info" and ("version", __version__) in labels for name, labels in found)


def test_names_follow_the_conventions() -> None:
    for family in counted(Region().totals()):
        assert family.name.startswith("interceptor_")
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.kind != "histogram" or family.name.endswith("_seconds")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_label_value_and_help_survives_the_text(value: str, text: str) -> None:
    document = render([Family("interceptor_x", "gauge", text, [Sample(1.5, (("label", value),))])]).decode()

    # The parser takes "\n" alone for a line's end, and so do we.
    (family,) = text_string_to_metric_families(document)
    assert family.samples[0].labels == {"label": value}
    assert family.samples[0].value == 1.5
