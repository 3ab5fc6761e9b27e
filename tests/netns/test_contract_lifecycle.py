"""Enable, enable again, enable otherwise under traffic, disable: what changes and what must not."""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import pytest

from interceptor import capture
from interceptor.errors import InterceptorError
from tests.rig.capturing import capturing, enable, options
from tests.rig.client import ANSWER_S, LOST, LOST_S, PROXY_UID, Answer, Question, ask, ask_all, connected, wait_until
from tests.rig.foreign import COUNTED, DROPPED, add_foreign_rules
from tests.rig.kernel import snapshot, written
from tests.rig.world import NETS, SECOND_OUTBOUND, Net, World, world

CONFIGS = [
    pytest.param({}, id="default"),
    pytest.param({"dns": "all", "exclude_outbound_ports": "1-1000,2000", "exclude_uids": "5"}, id="dns"),
    pytest.param({"inbound": "tproxy", "outbound": "tproxy", "udp": "tproxy", "dns": "all"}, id="tproxy"),
    pytest.param({"original_source": "true", "virtual_interfaces": "virt0", "drop_invalid": "true"}, id="original-source"),
    pytest.param({"ip_family": "v4", "log_rules": "true"}, id="v4-only"),
    pytest.param(
        {
            "exclude_outbound_cidrs": "10.0.3.0/24,10.0.4.0/24,10.9.0.0/16,fd00:0:0:3::/64,fd00:0:0:4::/64",
            "exclude_inbound_cidrs": "10.0.2.1,10.0.2.2,10.0.2.3,255.255.255.254,255.255.255.255",
        },
        id="cidrs-that-touch",
    ),
]
# A port a test: the one before may still be in TIME_WAIT.
PORTS = itertools.count(32000)
TPROXY = {"inbound": "tproxy", "outbound": "tproxy", "udp": "tproxy"}


@pytest.fixture(scope="module")
def host() -> Iterator[World]:
    """A network with someone else's rules in the pod."""
    with world() as built:
        add_foreign_rules(built.pod)
        for net in NETS.values():
            ask(built.pod, net.at("server", COUNTED))
        yield built


@pytest.mark.parametrize("texts", CONFIGS)
def test_disable_leaves_everything_as_it_was(texts: dict[str, str], host: World, backend: str) -> None:
    before = snapshot(host.pod)
    with capturing(host.pod, backend=backend, **texts):
        assert snapshot(host.pod) != before
    assert snapshot(host.pod) == before
    assert not capture.disable(netns=host.pod.name).changed


@pytest.mark.parametrize("other", ["nft", "iptables-legacy"])
def test_of_two_at_once_one_wins(other: str, host: World, backend: str) -> None:
    before = snapshot(host.pod)
    configs = [options(backend=backend, **TPROXY), options(backend=other, exclude_outbound_ports="5", inbound="tproxy")]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda config: capture.enable(config, netns=host.pod.name), configs))
    assert () in [capture.check(config, netns=host.pod.name).differences for config in configs]
    capture.disable(netns=host.pod.name)
    assert snapshot(host.pod) == before


@pytest.mark.parametrize("texts", CONFIGS)
def test_enable_again_touches_nothing(texts: dict[str, str], host: World, backend: str) -> None:
    config = options(backend=backend, **texts)
    with capturing(host.pod, backend=backend, **texts) as report:
        assert report.changed
        ask(host.pod, NETS["v4"].at("server"))
        before = written(host.pod)
        assert not capture.enable(config, netns=host.pod.name).changed
        assert before.is_untouched_in(written(host.pod))
        assert capture.check(config, netns=host.pod.name).differences == ()


def test_enable_otherwise_is_as_if_it_were_the_first(host: World, backend: str) -> None:
    for first, second in zip(CONFIGS, (*CONFIGS[1:3], CONFIGS[0]), strict=False):
        texts = dict(second.values[0])  # type: ignore[call-overload]
        with capturing(host.pod, backend=backend, **dict(first.values[0])):  # type: ignore[call-overload]
            assert enable(host.pod, backend=backend, **texts).changed
            assert capture.check(options(backend=backend, **texts), netns=host.pod.name).differences == ()


@pytest.mark.iptables
def test_another_backends_rules_are_removed(host: World, backend: str) -> None:
    before = snapshot(host.pod)
    for other in ("nft", "iptables-nft", "iptables-legacy"):
        if other == backend or (other, backend) == ("iptables-legacy", "libiptc"):
            continue
        with capturing(host.pod, backend=other):
            report = enable(host.pod, backend=backend)
            assert (report.changed, report.removed) == (True, (other,))
            assert capture.check(options(backend=backend), netns=host.pod.name).differences == ()
    assert snapshot(host.pod) == before


def test_foreign_rules_still_work(host: World, net: Net, backend: str) -> None:
    with capturing(host.pod, backend=backend, exclude_outbound_ports=f"{COUNTED},{DROPPED}"):
        before = snapshot(host.pod)
        assert ask(host.pod, net.at("server", DROPPED), timeout_s=LOST_S) == LOST
        assert ask(host.pod, net.at("server", COUNTED)) == Answer("far", net.at("server", COUNTED))
        after = snapshot(host.pod)
    assert _counted(after, net) > _counted(before, net)
    assert ask(host.pod, net.at("server", DROPPED), timeout_s=LOST_S) == LOST


def _counted(found: dict[str, str], net: Net) -> list[int]:
    programs = [program for program in found if program.startswith("iptables" if net.family == "v4" else "ip6tables")]
    text = "\n".join(found[program] for program in ("nft -a list ruleset", *programs))
    return [
        int(number)
        for number in re.findall(r"^\[(\d+):\d+\] .*comment foreign|packets (\d+) .*\"foreign\"", text)
        for number in number
        if number
    ]


@contextmanager
def traffic(questions: list[Question]) -> Iterator[Counter[Answer]]:
    """Connections all the time, one after the other; how each ended. At least 20 before the block and 20 after it."""
    ended: Counter[Answer] = Counter()
    stop = threading.Event()

    def run() -> None:
        for question in itertools.cycle(questions):
            if stop.is_set():
                return
            ended[ask_all([question])[0]] += 1

    thread = threading.Thread(target=run, name="traffic")
    thread.start()
    try:
        wait_until(lambda: ended.total() > 20, "traffic flows")
        yield ended
        reached = ended.total() + 20
        wait_until(lambda: ended.total() > reached, "traffic still flows", ANSWER_S * 2)
    finally:
        stop.set()
        thread.join()


OUTSIDE = {Answer("outbound", net.at("server")) for net in NETS.values()}
INSIDE = {Answer("inbound", net.at("pod")) for net in NETS.values()}
CAPTURED = OUTSIDE | INSIDE
DIRECT_OUT = {Answer("far", net.at("server")) for net in NETS.values()}
DIRECT_IN = {Answer("app", net.at("pod")) for net in NETS.values()}


def questions(w: World) -> list[Question]:
    """A connection out and one in, by v4 and by v6."""
    return [
        question
        for net in NETS.values()
        for question in (Question(w.pod, net.at("server")), Question(w.far, net.at("pod"), uid=0))
    ]


@contextmanager
def open_connections(asked: list[Question], expected: set[Answer]) -> Iterator[None]:
    """Connections answered as `expected` that carry data both ways all through the block, and after it."""
    with ExitStack() as stack:
        opened = [stack.enter_context(connected(item)) for item in asked]
        assert {answer for _, answer in opened} == expected
        sockets = [sock for sock, _ in opened]
        with ThreadPoolExecutor() as pool:
            stop = threading.Event()
            exchanging = [pool.submit(exchange_until, stop, sock) for sock in sockets]
            try:
                yield
            finally:
                stop.set()
            assert all(future.result() > 0 for future in exchanging)
        for sock in sockets:
            exchange(sock)


def exchange_until(stop: threading.Event, sock: socket.socket) -> int:
    """Send and get back until `stop`; how often."""
    for times in itertools.count(1):
        exchange(sock)
        if stop.wait(0.001):
            return times
    raise AssertionError


def exchange(sock: socket.socket) -> None:
    """Send two packets and more; get the same back."""
    sent = b"still there" * 300
    sock.sendall(sent)
    received = b""
    while len(received) < len(sent):
        received += sock.recv(len(sent)) or pytest.fail("closed")
    assert received == sent


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([{"dns": "all", "exclude_outbound_ports": "1-70,9999"}, {"exclude_uids": "5-9"}], id="lists"),
        pytest.param([{"outbound_port": str(SECOND_OUTBOUND)}], id="another-port"),
    ],
)
def test_reconfiguring_under_traffic_loses_and_leaks_nothing(others: list[dict[str, str]], w: World, backend: str) -> None:
    with capturing(w.pod, backend=backend), open_connections(questions(w), CAPTURED):
        with traffic(questions(w)) as ended:
            for texts in (*others, {}):
                assert enable(w.pod, backend=backend, **texts).changed
        assert set(ended) == CAPTURED


MARKED = {**TPROXY, "tproxy_mark": "0x400/0xfff", "tproxy_table": "400"}
OFF = {"inbound": "off", "outbound": "off"}
CHANGES = [
    pytest.param({}, TPROXY, id="redirect-to-tproxy"),
    pytest.param({}, {"inbound": "tproxy"}, id="redirect-to-tproxy-in"),
    pytest.param({"inbound": "tproxy"}, {}, id="tproxy-in-to-redirect"),
    pytest.param(TPROXY, {**TPROXY, "dns": "all", "exclude_uids": "7"}, id="tproxy-to-tproxy"),
    pytest.param(TPROXY, {}, id="tproxy-to-redirect"),
    pytest.param(TPROXY, {"inbound": "tproxy"}, id="tproxy-to-redirect-out"),
    pytest.param(TPROXY, {"ip_family": "dual", "udp": "tproxy", "dns": "all"}, id="tproxy-to-udp"),
    pytest.param(TPROXY, MARKED, id="tproxy-to-another-mark"),
    pytest.param(MARKED, {}, id="marked-to-redirect"),
    pytest.param({"outbound": "tproxy"}, {"outbound": "off"}, id="tproxy-to-off-out"),
    pytest.param(TPROXY, {"inbound": "off"}, id="tproxy-to-off-in"),
    pytest.param(TPROXY, OFF, id="tproxy-to-off"),
    pytest.param({}, OFF, id="redirect-to-off"),
    pytest.param(OFF, {}, id="off-to-redirect"),
    pytest.param(OFF, TPROXY, id="off-to-tproxy"),
]


@pytest.mark.slow
def test_changing_the_mechanism_again_and_again_loses_and_leaks_nothing(w: World, backend: str) -> None:
    mechanisms = [TPROXY, {}, {"inbound": "tproxy"}, {"outbound": "tproxy"}, {}] * 2
    with capturing(w.pod, backend=backend), open_connections(questions(w), CAPTURED):
        with traffic(questions(w)) as ended:
            for texts in mechanisms:
                assert enable(w.pod, backend=backend, **texts).changed
        assert set(ended) == CAPTURED


def answers(*, inbound: str = "redirect", outbound: str = "redirect", **_: str) -> set[Answer]:
    """To questions(), by these options."""
    return (DIRECT_OUT if outbound == "off" else OUTSIDE) | (DIRECT_IN if inbound == "off" else INSIDE)


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_changing_the_mechanism_keeps_open_connections(
    first: dict[str, str], second: dict[str, str], w: World, backend: str
) -> None:
    with capturing(w.pod, backend=backend, **first), open_connections(questions(w), answers(**first)):
        with traffic(questions(w)) as ended:
            enable(w.pod, backend=backend, **second)
        assert set(ended) == answers(**first) | answers(**second)
        assert set(ask_all(questions(w))) == answers(**second)
        before = written(w.pod)
        assert capture.check(options(backend=backend, **second), netns=w.pod.name).differences == ()
        assert not enable(w.pod, backend=backend, **second).changed
        assert before.is_untouched_in(written(w.pod))


GUESTS = {**TPROXY, "virtual_interfaces": "virt0"}


@pytest.mark.parametrize(
    "second",
    [
        pytest.param({"virtual_interfaces": "virt0"}, id="redirect"),
        pytest.param({"virtual_interfaces": "virt0", "inbound": "tproxy"}, id="redirect-out"),
        pytest.param({**GUESTS, "exclude_outbound_ports": "80"}, id="excluded"),
        pytest.param(TPROXY, id="not-virtual"),
        pytest.param(OFF, id="off"),
    ],
)
def test_a_guests_open_connections_are_kept(second: dict[str, str], w: World, backend: str) -> None:
    asked = [Question(w.guest, net.at("server"), uid=0) for net in NETS.values()]
    with capturing(w.pod, backend=backend, **GUESTS), open_connections(asked, OUTSIDE):
        enable(w.pod, backend=backend, **second)
    # And nobody's connection that was open before is torn to the proxy midway.
    with open_connections(asked, DIRECT_OUT), capturing(w.pod, backend=backend, **GUESTS):
        pass


@pytest.mark.parametrize("inbound", ["redirect", "tproxy"])
@pytest.mark.parametrize("second", [pytest.param({}, id="redirect"), pytest.param(OFF, id="off")])
def test_the_proxys_connections_from_the_clients_address_are_kept(
    second: dict[str, str], inbound: str, w: World, backend: str
) -> None:
    asked = [
        Question(w.pod, net.at("pod"), uid=PROXY_UID, source=net.at("other", next(PORTS)), transparent=True)
        for net in NETS.values()
    ]
    with capturing(w.pod, backend=backend, inbound=inbound, original_source="true"), open_connections(asked, DIRECT_IN):
        enable(w.pod, backend=backend, **second)


@pytest.mark.parametrize("second", [pytest.param({}, id="udp-off"), pytest.param(OFF, id="off")])
def test_udp_is_decided_anew_with_each_datagram(second: dict[str, str], w: World, net: Net, backend: str) -> None:
    out = Question(w.pod, net.at("server"), "udp", source=net.at("pod", next(PORTS)))
    into = Question(w.far, net.at("pod"), "udp", uid=0, source=net.at("other", next(PORTS)))
    with capturing(w.pod, backend=backend, **TPROXY):
        assert ask_all([out, into]) == [Answer("outbound", out.to), Answer("inbound", into.to)]
        enable(w.pod, backend=backend, **second)
        assert ask_all([out, into]) == [Answer("far", out.to), Answer("app", into.to)]
        enable(w.pod, backend=backend, **TPROXY)
        assert ask_all([out, into]) == [Answer("outbound", out.to), Answer("inbound", into.to)]


@pytest.mark.iptables
def test_changing_the_backend_under_traffic_loses_and_leaks_nothing(w: World, backend: str) -> None:
    other = "iptables-nft" if backend == "nft" else "nft"
    with capturing(w.pod, backend=other), open_connections(questions(w), CAPTURED):
        with traffic(questions(w)) as ended:
            for name in (backend, other):
                assert enable(w.pod, backend=name).changed
        assert set(ended) == CAPTURED


def test_a_refused_configuration_changes_nothing(w: World, backend: str) -> None:
    with capturing(w.pod, backend=backend):
        before = written(w.pod)
        with pytest.raises(InterceptorError, match="cgroup"):
            enable(w.pod, backend=backend, proxy_cgroup="no/such/cgroup")
        assert before.is_untouched_in(written(w.pod))


def test_without_net_admin_every_verb_says_so_and_changes_nothing(w: World, backend: str) -> None:
    unprivileged = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-m", "interceptor")
    verbs = (("init", "--backend", backend, "--exclude-uids", "7"), ("check", "--backend", backend), ("clean",))
    with capturing(w.pod, backend=backend):
        before = written(w.pod)
        for verb in verbs:
            argv = ["ip", "netns", "exec", w.pod.name, *unprivileged, *verb]
            done = subprocess.run(argv, text=True, capture_output=True, timeout=60, check=False)
            assert (done.returncode, done.stdout) == (5, "")
            assert "CAP_NET_ADMIN" in done.stderr
            assert "run as root" in done.stderr
        assert before.is_untouched_in(written(w.pod))


def test_a_plan_that_never_saw_tproxy_has_no_rule_for_it(host: World, backend: str) -> None:
    with capturing(host.pod, backend=backend) as fresh:
        assert fresh.plan.routes == ()
    with capturing(host.pod, backend=backend, **TPROXY):
        pass
    with capturing(host.pod, backend=backend) as again:
        assert again.plan == fresh.plan


WINNING = {
    "better-metric": "route add {anywhere} via {far} dev eth0 table 133 metric 5",
    "longer-prefix": "route add {server}/{bits} via {far} dev eth0 table 133 metric 5000",
    "unreachable": "route add unreachable default table 133 metric 7",
}


@pytest.mark.parametrize("route", WINNING)
def test_a_foreign_route_that_wins_over_ours_is_told_and_refused(route: str, w: World, net: Net) -> None:
    line = WINNING[route].format(**asdict(net))
    config = options(**TPROXY)
    with capturing(w.pod, **TPROXY):
        w.pod.run("ip", f"-{net.family[1]}", *line.split())
        found = capture.check(config, netns=w.pod.name).differences
        assert [(item.kind, item.where) for item in found] == [("extra", "policy route")]
        before = snapshot(w.pod)
        with pytest.raises(InterceptorError, match=f"IP{net.family} table 133: .* metric .*--tproxy-table"):
            enable(w.pod, **TPROXY)
        assert snapshot(w.pod) == before
        w.pod.run("ip", f"-{net.family[1]}", *line.replace(" add ", " del ").split())
        assert capture.check(config, netns=w.pod.name).differences == ()


def test_a_foreign_route_that_does_the_same_is_left_alone(w: World) -> None:
    same = "route add local default dev lo table 133"
    for family in ("-4", "-6"):
        w.pod.run("ip", family, *same.split())
    before = snapshot(w.pod)
    with capturing(w.pod, **TPROXY):
        assert capture.check(options(**TPROXY), netns=w.pod.name).differences == ()
        assert set(ask_all(questions(w))) == CAPTURED
    assert snapshot(w.pod) == before
    for family in ("-4", "-6"):
        w.pod.run("ip", family, *same.replace(" add ", " del ").split())
