"""The benchmarks' own arithmetic: what load generators and proxies print, ratios of rounds, and which runs count."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import accounting, audit, contenders, figures, generators, report, targets
from bench.counts import strace_table
from bench.runs import Book, Run

WRK = """\
Running 1s test @ http://10.78.0.2:8080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   394.51us  166.69us   2.09s    95.98%
    Req/Sec    12.25k     9.26k   32.33k    64.71%
  Latency Distribution
     50%  377.86us
     75%  427.49us
     90%    1.02ms
     99%    2.09s 
  41234 requests in 1.10s, 5.66MB read
{}Requests/sec:  37485.45
Transfer/sec:      5.14MB
"""  # noqa: W291 - wrk pads one-letter units


@pytest.mark.parametrize(
    ("said", "errors"),
    [
        ("", 0),
        ("  Socket errors: connect 1, read 2, write 0, timeout 4\n", 7),
        ("  Non-2xx or 3xx responses: 12\n", 12),
        ("  Socket errors: connect 1, read 0, write 0, timeout 0\n  Non-2xx or 3xx responses: 12\n", 13),
    ],
    ids=["none", "sockets", "answers", "both"],
)
def test_wrk_is_read_with_its_errors(said: str, errors: int) -> None:
    found = generators.wrk(WRK.format(said))
    assert (found.count, found.duration_s, found.errors) == (41234, 1.1, errors)
    assert found.p50_s == pytest.approx(377.86e-6)
    assert found.p99_s == pytest.approx(2.09)


def test_what_is_not_wrks_output_is_refused() -> None:
    with pytest.raises(ValueError, match="unable to connect"):
        generators.wrk("unable to connect to 10.78.0.2:8080 Connection refused")


def test_iperf3_counts_what_was_received() -> None:
    text = '{"end": {"sum_sent": {"bytes": 9, "seconds": 1}, "sum_received": {"bytes": 8, "seconds": 2.0}}}'
    assert generators.iperf3(text) == generators.Transfer(8, 2.0)


def test_iperf3_gives_its_own_reason() -> None:
    with pytest.raises(ValueError, match="Connection refused"):
        generators.iperf3('{"error": "unable to connect to server: Connection refused"}')


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine was twice as fast in round 1: the ratio is 0.5 all the same, where one of medians would be 0.25 or 1.
    found = figures.ratio({0: 5.0, 1: 10.0, 2: 7.0}, {0: 10.0, 1: 20.0})
    assert found == figures.Spread(median=0.5, low=0.5, high=0.5, count=2)


def test_a_ratio_to_nothing_is_none() -> None:
    assert figures.ratio({0: 5.0}, {0: 0.0}) is None
    assert figures.ratio({0: 5.0}, {1: 5.0}) is None


def test_a_difference_is_taken_within_rounds() -> None:
    assert figures.difference({0: 5.0, 1: 9.0}, {0: 3.0, 1: 8.0}) == figures.Spread(median=1.5, low=1.0, high=2.0, count=2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.001234, "0.00123"), (12.345, "12.3"), (108_312.0, "108,000"), (-3.14159, "-3.14"), (999.9, "1,000")],
)
def test_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert figures.digits(value) == text


def test_a_spread_is_shown_with_its_extremes() -> None:
    assert figures.shown(figures.spread([3.0, 1.0, 2.0])) == "2.00 [1.00–3.00]"
    assert figures.shown(figures.spread([2.0])) == "2.00"
    assert figures.shown(figures.spread([])) == "–"
    assert figures.shown(figures.spread([0.01, 0.02]), noise=0.02) == "0"


def test_a_servers_own_count() -> None:
    said = "HTTP/1.1 200 OK\r\n\r\nActive connections: 1 \nserver accepts handled requests\n 42 41 40 \nReading: 0 Writing: 1\n"
    assert generators.nginx_accepted(said) == 42
    with pytest.raises(ValueError, match="stub_status"):
        generators.nginx_accepted("HTTP/1.1 404 Not Found")


def counted(
    pod_passive: int, far_active: int, far_passive: int, own: int | None = None, served: int | None = None
) -> audit.Counted:
    return audit.Counted(0, pod_passive, far_active, far_passive, own, served)


@pytest.mark.parametrize(
    ("run", "direction", "proxied", "wrong"),
    [
        (counted(100, 0, 100, own=100), "outbound", True, None),
        (counted(105, 0, 100, own=103), "outbound", True, None),
        (counted(99, 0, 100), "outbound", True, "1 of 100 connections went around the proxy"),
        (counted(99, 0, 100, served=99), "outbound", True, None),
        (counted(99, 0, 100, served=100), "outbound", True, "1 of 100 connections went around the proxy"),
        (counted(100, 0, 100, served=0), "outbound", True, None),
        (counted(120, 0, 100), "outbound", True, "20 of 120 connections never reached the server"),
        (counted(100, 0, 100, own=50), "outbound", True, "the proxy says it accepted 50 connections, the kernel counted 100"),
        (counted(0, 0, 0), "outbound", True, "no connection reached the server"),
        (counted(0, 0, 100), "outbound", False, None),
        (counted(3, 0, 100), "outbound", False, "3 connections were captured though there is no proxy"),
        (counted(200, 100, 0, own=100), "inbound", True, None),
        (counted(195, 100, 0), "inbound", True, None),
        (counted(150, 100, 0), "inbound", True, "40 of 100 connections went around the proxy"),
        (counted(100, 100, 0), "inbound", False, None),
        (counted(200, 100, 0), "inbound", False, "100 connections were captured though there is no proxy"),
    ],
)
def test_a_run_with_bypassed_connections_does_not_count(
    run: audit.Counted, direction: audit.Direction, proxied: bool, wrong: str | None
) -> None:
    assert audit.complaint(run, direction, proxied=proxied, slack=10) == wrong


def test_counters_are_differences() -> None:
    before = {"pod": {"ActiveOpens": 1, "PassiveOpens": 2}, "far": {"ActiveOpens": 3, "PassiveOpens": 4}}
    after = {"pod": {"ActiveOpens": 2, "PassiveOpens": 4}, "far": {"ActiveOpens": 6, "PassiveOpens": 8}}
    assert audit.Counted.between(before, after, own=None) == audit.Counted(1, 2, 3, 4, None)


def test_a_proxys_own_count() -> None:
    envoy = "HTTP/1.1 200 OK\r\n\r\nlistener.outbound_v4.downstream_cx_total: 7\nlistener.inbound_v6.downstream_cx_total: 2\n"
    # The workers' own copies of the same count.
    envoy += "listener.outbound_v4.worker_0.downstream_cx_total: 7\n"
    assert contenders.envoy_count(envoy) == 9
    assert contenders.haproxy_count("Name: HAProxy\nCumConns: 8\nCumReq: 8\n") == 7
    assert contenders.own_count('interceptor: listening: ...\n{"connections_opened": 12}\n') == 12
    assert contenders.own_count("Traceback") is None


def test_an_envoy_without_counts_is_an_error() -> None:
    with pytest.raises(ValueError, match="426"):
        contenders.envoy_count("HTTP/1.1 426 Upgrade Required\r\n\r\n")


@pytest.mark.parametrize(
    ("option", "value", "there"),
    [
        *(("--relay", "splice", True), ("--relay", "packet", False), ("--workers", "2", True), ("--shiny", "1", False)),
        *(("--limit", "3", True), ("--limit", "auto", True), ("--limit", "some", False)),
    ],
)
def test_what_a_build_offers_is_read_from_its_help(option: str, value: str, there: bool) -> None:
    text = "Options:\n  --relay copy|splice   How bytes move.\n  --workers COUNT  Processes.\n  --limit N|auto  How many.\n"
    assert contenders.offered(text, option, value) is there


def test_a_process_name_may_hold_anything() -> None:
    row = accounting.parse_stat("77 (a) b (c) S 5 77 77 0 -1 4194304 100 0 0 0 10 20 3 4 20 0 1 0 9 0")
    assert (row.parent, row.ticks) == (5, 37)


def test_a_family_is_all_descendants() -> None:
    assert accounting.family(2, {1: 0, 2: 1, 3: 2, 4: 3, 5: 1}) == {2, 3, 4}


def test_strace_rows_are_read() -> None:
    text = "syscall             calls\n---------------- ---------\nepoll_wait              12\nread                     3\n"
    assert strace_table(text + "---------------- ---------\ntotal                   15\n") == {"epoll_wait": 12, "read": 3}


def run(contender: str, number: int, rate: float) -> Run:
    values = {"rate": rate, "p50_us": 9.0, "p99_us": 9.0, "proxy_us": 0.0, "system_us": 1.0, "switches": 0.0}
    return Run("outbound-v4", "outbound-v4", "rr", contender, number, values, foreign_cores=0.5 * number, connections=64)


def test_a_report_names_what_disturbed_it() -> None:
    book = Book(
        0.1, [run("none", 0, 100), run("copy", 0, 40), run("none", 1, 200), run("copy", 1, 80)], ["a run: why"], {"x": "no"}
    )
    text = report.markdown(book, command="me", machine=["- it"], titles={"none": "no proxy", "copy": "ours"})
    assert "| ours | 60.0 [40.0–80.0] | ×0.40 [0.40–0.40] |" in text
    assert "- rr: 2 of 4, by up to 0.50 cores" in text
    assert "- a run: why" in text
    assert "- x: no" in text


def test_a_report_says_which_targets_were_missed() -> None:
    rows = [("none", 100), ("envoy", 45), ("packet", 90), ("splice", 40)]
    book = Book(0.1, [run(name, number, rate) for number in (0, 1) for name, rate in rows])
    text = report.markdown(book, command="me", machine=[], titles={name: name for name, _ in rows})
    assert "| packet | requests/s, × no proxy | ≥ 0.85 | 0.900 [0.900–0.900] | reached |" in text
    assert "| packet | requests/s, × Envoy | ≥ 2.2 | 2.00 [2.00–2.00] | **missed** |" in text
    assert "| splice | requests/s, × Envoy | ≥ 1 | 0.889 [0.889–0.889] | **missed** |" in text


def test_targets_are_for_one_section_alone() -> None:
    elsewhere = [replace(run(name, 0, 1), section="inbound-v4") for name in ("none", "packet")]
    assert targets.targets_table(elsewhere, {"packet": "packet"}) == []
