"""--before-proxy: where outbound traffic goes while the proxy is not ready, who may say that it is, and that it stays so."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable

import pytest

from interceptor import capture
from interceptor.backends import announced as noting
from interceptor.netns import entered
from interceptor.proxy import readiness
from interceptor.values import Family
from tests.netns.test_contract_lifecycle import CAPTURED, questions, traffic
from tests.rig.announcing import PORT, announce
from tests.rig.capturing import capturing, enable, options
from tests.rig.client import LOST, LOST_S, PROXY_UID, REFUSED, Answer, Question, ask, ask_all, connected
from tests.rig.kernel import forget_connections, snapshot, written
from tests.rig.net import Pod, pods, wire
from tests.rig.servers import Server, serving
from tests.rig.sockets import identity, open_socket, split
from tests.rig.world import NETS, RESETTING, Net, World

Ask = Callable[..., Answer]
BYPASS = {"before_proxy": "bypass"}
TPROXY = {"inbound": "tproxy", "outbound": "tproxy", "udp": "tproxy"}
BOTH = ("127.0.0.1", "::1")
# A port a test: the one before may still be in TIME_WAIT.
SOURCES = itertools.count(33000)
MECHANISMS = [
    pytest.param({}, id="redirect"),
    pytest.param({"dns": "all"}, id="redirect-dns"),
    pytest.param(TPROXY, id="tproxy"),
    pytest.param({**TPROXY, "dns": "all"}, id="tproxy-dns"),
    pytest.param({"outbound": "off", "inbound": "off", "dns": "all"}, id="dns-alone"),
]


def asked(w: World, net: Net, texts: dict[str, str]) -> dict[str, Question]:
    """What an application sends that these options capture."""
    found = {"tcp": Question(w.pod, net.at("server"))} if texts.get("outbound") != "off" else {}
    if "udp" in texts:
        found["udp"] = Question(w.pod, net.at("server"), "udp")
    if "dns" in texts:
        found["dns"] = Question(w.pod, net.at("resolver", 53), "udp")
        found["dns by tcp"] = Question(w.pod, net.at("resolver", 53))
    return found


def answered(questions: dict[str, Question]) -> dict[str, str]:
    """Who answers each."""
    return dict(zip(questions, (answer.by for answer in ask_all(list(questions.values()))), strict=True))


def captured(questions: dict[str, Question]) -> dict[str, str]:
    """Who should, when all is captured."""
    return {name: "dns" if name.startswith("dns") else "outbound" for name in questions}


@pytest.mark.parametrize("texts", MECHANISMS)
def test_traffic_goes_direct_until_the_proxy_announces_itself(texts: dict[str, str], w: World, net: Net, backend: str) -> None:
    questions = asked(w, net, texts)
    with capturing(w.pod, backend=backend, **BYPASS, **texts):
        assert answered(questions) == dict.fromkeys(questions, "far")
        assert announce(w.pod) == BOTH
        assert answered(questions) == captured(questions)
    forget_connections(w.pod)


def test_block_refuses_until_the_proxy_listens(w: World, net: Net, backend: str) -> None:
    nobody = {"outbound_port": "15301", "dns_port": "15353", "dns": "all"}
    with capturing(w.pod, backend=backend, **nobody):
        assert ask(w.pod, net.at("server")) == REFUSED
        assert ask(w.pod, net.at("resolver", 53)) == REFUSED
        assert ask(w.pod, net.at("resolver", 53), proto="udp") == REFUSED
        assert announce(w.pod) == ()
    forget_connections(w.pod)


def test_block_drops_by_tproxy_until_the_proxy_listens(w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **TPROXY, outbound_port="15301"):
        for proto in ("tcp", "udp"):
            assert ask(w.pod, net.at("server"), proto=proto, timeout_s=LOST_S) == LOST
    forget_connections(w.pod)


def test_nobody_else_announces_the_proxy(w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS):
        assert announce(w.pod, 1000) == ()
        assert announce(w.pod, 0) == ()
        assert ask(w.pod, net.at("server")) == Answer("far", net.at("server"))


def test_what_the_proxy_sends_elsewhere_announces_nothing(w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS):
        for to in (net.at("server", PORT), net.at("loopback", PORT + 1)):
            with open_socket(w.pod, socket.SOCK_DGRAM, to, uid=PROXY_UID, gid=PROXY_UID) as sock:
                sock.sendto(b"ready", split(to))
        assert ask(w.pod, net.at("server")) == Answer("far", net.at("server"))


@pytest.mark.parametrize(
    ("texts", "who"),
    [
        pytest.param({"proxy_uid": "3,4", "proxy_gid": ""}, {"uid": 4}, id="second-uid"),
        pytest.param({"proxy_uid": "", "proxy_gid": "77"}, {"uid": 1000, "gid": 77}, id="gid"),
        pytest.param(
            {"proxy_uid": "", "proxy_gid": "", "proxy_mark": "0x10000/0x10000"}, {"uid": 0, "mark": 0x10000}, id="mark"
        ),
    ],
)
def test_the_proxy_announces_itself_by_its_identity(
    texts: dict[str, str], who: dict[str, int], w: World, net: Net, backend: str
) -> None:
    with capturing(w.pod, backend=backend, **BYPASS, **texts):
        assert announce(w.pod, 1000) == ()
        assert ask(w.pod, net.at("server")) == Answer("far", net.at("server"))
        assert announce(w.pod, **who) == BOTH
        assert ask(w.pod, net.at("server")) == Answer("outbound", net.at("server"))


@pytest.mark.parametrize("texts", [pytest.param({}, id="redirect"), pytest.param(TPROXY, id="tproxy")])
def test_a_connection_from_before_stays_direct_and_the_next_is_captured(
    texts: dict[str, str], w: World, net: Net, backend: str
) -> None:
    with (
        capturing(w.pod, backend=backend, **BYPASS, **texts),
        connected(Question(w.pod, net.at("server"))) as (sock, first),
    ):
        assert first == Answer("far", net.at("server"))
        announce(w.pod)
        sock.sendall(b"still here")
        assert sock.recv(64) == b"still here"
        assert ask(w.pod, net.at("server")) == Answer("outbound", net.at("server"))


@pytest.mark.parametrize(
    ("texts", "to", "then"),
    [
        pytest.param({"dns": "all"}, ("resolver", 53), "dns", id="dns"),
        pytest.param(TPROXY, ("server", 80), "outbound", id="udp"),
    ],
)
def test_datagrams_of_one_socket_are_captured_from_the_announcement_on(
    texts: dict[str, str], to: tuple[str, int], then: str, w: World, net: Net, backend: str
) -> None:
    source = net.at("pod", next(SOURCES))
    question = Question(w.pod, net.at(*to), "udp", source=source)
    with capturing(w.pod, backend=backend, **BYPASS, **texts):
        assert [answer.by for answer in ask_all([question])] == ["far"]
        announce(w.pod)
        assert [answer.by for answer in ask_all([question])] == [then]
    forget_connections(w.pod)


@pytest.mark.parametrize("texts", [pytest.param({}, id="redirect"), pytest.param({"outbound": "tproxy"}, id="tproxy")])
def test_a_reset_connection_from_before_is_no_way_around(texts: dict[str, str], w: World, net: Net, backend: str) -> None:
    source = net.at("pod", next(SOURCES))
    to = net.at("server", RESETTING)
    with capturing(w.pod, backend=backend, **BYPASS, **texts):
        assert ask(w.pod, to, source=source) == Answer("reset")
        announce(w.pod)
        assert ask(w.pod, to, source=source) == Answer("outbound", to)


@pytest.mark.parametrize("texts", [pytest.param({}, id="redirect"), pytest.param(TPROXY, id="tproxy")])
def test_inbound_and_the_proxys_own_traffic_do_not_wait(texts: dict[str, str], w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS, **texts):
        assert ask(w.far, net.at("pod"), uid=0) == Answer("inbound", net.at("pod"))
        assert ask(w.pod, net.at("pod"), uid=PROXY_UID) == Answer("inbound", net.at("pod"))
        assert ask(w.pod, net.at("server"), uid=PROXY_UID) == Answer("far", net.at("server"))


def test_an_applications_answers_to_datagrams_find_their_way(w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS, inbound="off", udp="tproxy", dns="all"):
        for port in (8080, 53):
            assert ask(w.far, net.at("pod", port), uid=0, proto="udp") == Answer("app", net.at("pod", port))


@pytest.mark.parametrize("texts", [pytest.param({}, id="redirect"), pytest.param(TPROXY, id="tproxy")])
def test_what_comes_from_a_virtual_interface_waits_too(texts: dict[str, str], w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS, **texts, virtual_interfaces="virt0"):
        assert ask(w.guest, net.at("server"), uid=0) == Answer("far", net.at("server"))
        announce(w.pod)
        assert ask(w.guest, net.at("server"), uid=0) == Answer("outbound", net.at("server"))


def test_an_uncovered_family_is_blocked_from_the_announcement_on(w: World, backend: str) -> None:
    v4, v6 = NETS["v4"].at("server"), NETS["v6"].at("server")
    with capturing(w.pod, backend=backend, **BYPASS, ip_family="v4"):
        assert ask_all([Question(w.pod, v4), Question(w.pod, v6)]) == [Answer("far", v4), Answer("far", v6)]
        announce(w.pod)
        assert ask(w.pod, v4) == Answer("outbound", v4)
        assert ask(w.pod, v6, timeout_s=LOST_S) == LOST


def test_a_family_that_was_not_announced_is_told_by_check(w: World, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS):
        with entered(w.pod.path), identity(PROXY_UID, PROXY_UID):
            assert readiness.announce(("127.0.0.1",), PORT) == ("127.0.0.1",)
        v6 = ask(w.pod, NETS["v6"].at("server")).by
        assert v6 == ("outbound" if backend == "nft" else "far"), "nft notes it for both"
        checked = capture.check(options(backend=backend, **BYPASS), netns=w.pod.name)
        assert checked.announced is (v6 == "outbound")


def test_without_v6_on_lo_the_proxy_announces_itself_at_another_address(backend: str) -> None:
    v6 = NETS["v6"]
    with pods(2) as (pod, far), serving() as servers:
        pod.sysctl("ipv6/conf/lo/disable_ipv6", "1")
        wire(pod, far, ("eth0", "eth0"), ([f"{v6.pod}/64"], [f"{v6.far}/64"]))
        servers.listen(Server("far", far, uid=0), 80)
        with capturing(pod, backend=backend, **BYPASS, inbound="off"):
            assert ask(pod, v6.at("far")) == Answer("far", v6.at("far"))
            assert announce(pod, own=(v6.pod,)) == ("127.0.0.1", v6.pod)
            # It is led to ::1, which is not there: closed, at least.
            assert ask(pod, v6.at("far"), timeout_s=LOST_S).by in ("unreachable", "lost", "refused")


ALIKE = [pytest.param(False, id="before"), pytest.param(True, id="after")]


def who_answers(w: World, net: Net, *, is_announced: bool) -> None:
    """Fails unless an application is answered by whom it should be."""
    assert ask(w.pod, net.at("server")) == Answer("outbound" if is_announced else "far", net.at("server"))


@pytest.mark.parametrize("is_announced", ALIKE)
def test_check_and_enable_again_are_content(is_announced: bool, w: World, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS, dns="all", ip_family="v4"):
        if is_announced:
            announce(w.pod)
        before = written(w.pod)
        assert not enable(w.pod, backend=backend, **BYPASS, dns="all", ip_family="v4").changed
        assert before.is_untouched_in(written(w.pod))
        checked = capture.check(options(backend=backend, **BYPASS, dns="all", ip_family="v4"), netns=w.pod.name)
        assert (checked.differences, checked.announced) == ((), is_announced)


@pytest.mark.parametrize("is_announced", ALIKE)
def test_another_configuration_keeps_the_state(is_announced: bool, w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS):
        if is_announced:
            announce(w.pod)
        for texts in ({"dns": "all", "exclude_uids": "5"}, {**TPROXY, "dns": "all"}, {}):
            assert enable(w.pod, backend=backend, **BYPASS, **texts).changed
            who_answers(w, net, is_announced=is_announced)


@pytest.mark.parametrize("is_announced", ALIKE)
@pytest.mark.parametrize("other", ["nft", "iptables-nft", "iptables-legacy"])
def test_another_backend_keeps_the_state(other: str, is_announced: bool, w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=other, **BYPASS):
        if is_announced:
            announce(w.pod)
        enable(w.pod, backend=backend, **BYPASS)
        who_answers(w, net, is_announced=is_announced)


def test_what_was_captured_is_not_let_go_by_a_change_to_bypass(w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend):
        assert enable(w.pod, backend=backend, **BYPASS).changed
        who_answers(w, net, is_announced=True)


def test_no_change_under_traffic_lets_anything_go(w: World, backend: str) -> None:
    changes: list[dict[str, str]] = [BYPASS, {**BYPASS, "exclude_uids": "7"}, {**BYPASS, **TPROXY}, {}, BYPASS]
    with capturing(w.pod, backend=backend):
        with traffic(questions(w)) as ended:
            for texts in changes:
                enable(w.pod, backend=backend, **texts)
        assert set(ended) == CAPTURED


def test_rules_that_were_lost_are_healed_closed(w: World, net: Net, backend: str) -> None:
    with capturing(w.pod, backend=backend, **BYPASS):
        announce(w.pod)
        capture.disable(netns=w.pod.name)
        capture.enable(options(backend=backend, **BYPASS), netns=w.pod.name, had_rules=True)
        who_answers(w, net, is_announced=True)


def test_clean_forgets(w: World, net: Net, backend: str) -> None:
    before = snapshot(w.pod)
    with capturing(w.pod, backend=backend, **BYPASS):
        announce(w.pod)
    assert snapshot(w.pod) == before
    assert state(w.pod) is None
    with capturing(w.pod, backend=backend, **BYPASS):
        who_answers(w, net, is_announced=False)


def test_announcing_once_changes_the_fingerprint_once(w: World, backend: str) -> None:
    # The node agent looks closer only when it has changed: once is to be told, every 2 s would be a comparison every 2 s.
    with capturing(w.pod, backend=backend, **BYPASS):
        early = capture.fingerprint(netns=w.pod.name)
        announce(w.pod)
        assert state(w.pod) == set(Family)
        announced = capture.fingerprint(netns=w.pod.name)
        announce(w.pod)
        assert capture.fingerprint(netns=w.pod.name) == announced
        assert early != announced or announced is None


def state(pod: Pod) -> frozenset[Family] | None:
    """What the rules in `pod` have noted."""
    with entered(pod.path):
        return noting.noted()
