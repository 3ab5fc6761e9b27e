"""DNS through the proxy: real queries, captured by real rules, servers of our own behind it, both families."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rrset
import dns.update
import pytest

from interceptor.errors import ProxyError
from interceptor.proxy.dns.ports import MAX_WRONG, USES
from tests.proxy.pods import DEADLINE_S, DNS, OUTBOUND, REDIRECT_RULES, V4, V6, Pods, client, is_reset, listen, pods, proxy
from tests.proxy.resolvers import ADDRESSES, answer, negative, receive, send, server, stub, usual

pytestmark = pytest.mark.netns
NETS = pytest.mark.parametrize("net", [V4, V6], ids=["v4", "v6"])
LISTENERS = {"listeners": [("outbound", "redirect", OUTBOUND, family) for family in ("v4", "v6")], "dns_port": DNS}


@pytest.fixture(scope="module")
def pod() -> Iterator[Pods]:
    """A pod whose DNS and TCP are brought to the proxy."""
    with pods("dns") as made:
        made.rules(REDIRECT_RULES)
        for net in (V4, V6):  # neighbours found: a question that waits for that is asked twice
            with pytest.raises(ConnectionRefusedError):
                client(made.far, net["pod"], 7999)
        yield made


def at(ip: str, port: int = 5353) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def settings(*resolvers: str, **more: Any) -> dict[str, Any]:
    return {**LISTENERS, "resolvers": list(resolvers), **more}


def values(response: dns.message.Message) -> list[str]:
    return sorted(str(item) for rrset in response.answer for item in rrset)


@NETS
def test_a_question_is_asked_once_and_answered_from_the_cache_after(pod: Pods, net: dict[str, str]) -> None:
    with server(pod.far, net["far"]) as upstream, proxy(pod.pod, **settings(at(net["far"]))) as running:
        with stub(pod, net["far"]) as client:
            first, second = client.ask("www.test"), client.ask("WwW.tESt")
        assert values(first) == values(second) == ADDRESSES["A"]
        assert str(second.answer[0].name) == "WwW.tESt."
        assert len(upstream.seen) == 1
        cached = running.flow(lambda flow: flow["reason"] == "cached")
        asked = running.flow(lambda flow: flow["reason"] == "answered")
    assert cached["dns"] == {"name": "www.test", "type": "A", "rcode": "NOERROR", "answers": 2, "from": "cache"}
    assert asked["dns"]["from"] == at(net["far"])
    assert asked["upstream_local"].startswith(at(net["pod"], 0)[:-1])


@NETS
def test_questions_over_tcp_are_answered_from_the_same_cache(pod: Pods, net: dict[str, str]) -> None:
    with server(pod.far, net["far"]) as upstream, proxy(pod.pod, **settings(at(net["far"]))) as running:
        with stub(pod, net["far"]) as client:
            assert values(client.ask("www.test", "AAAA")) == values(client.ask_tcp("www.test", "AAAA")) == ADDRESSES["AAAA"]
        assert [transport for _, transport, _ in upstream.seen] == ["udp"]
        flow = running.flow(lambda flow: flow["protocol"] == "tcp")
    assert (flow["original_dst"], flow["dns"]["from"]) == (at(net["far"], 53), "cache")


def test_many_questions_on_one_connection_are_each_answered(pod: Pods) -> None:
    queries = {number: dns.message.make_query(f"n{number}.test", "A", id=number) for number in range(300)}
    with server(pod.far, V4["far"]), proxy(pod.pod, **settings(at(V4["far"]))), client(pod.pod, V4["far"], 53) as sock:
        send(sock, *(query.to_wire() for query in queries.values()))
        sock.shutdown(socket.SHUT_WR)
        responses = [dns.message.from_wire(receive(sock)) for _ in queries]
        assert sock.recv(1) == b""
    assert sorted(response.id for response in responses) == list(queries)
    assert all(queries[response.id].is_response(response) for response in responses)


def test_a_client_that_reads_when_it_has_asked_everything_gets_every_answer(pod: Pods) -> None:
    count = 20_000  # 1.2 MB of answers: more than any buffer here takes
    asked = dns.message.make_query("www.test", "A").to_wire()
    with server(pod.far, V4["far"]), proxy(pod.pod, **settings(at(V4["far"]))), client(pod.pod, V4["far"], 53) as sock:
        writer = threading.Thread(target=send, args=(sock, *[asked] * count))
        writer.start()
        answers = {receive(sock) for _ in range(count)}
        writer.join()
    assert {len(each) for each in answers} == {len(asked) + 2 * 16}


def test_a_change_of_a_zone_goes_through_to_the_server(pod: Pods) -> None:
    update = dns.update.UpdateMessage("test.")
    update.add("new", 60, "A", "192.0.2.1")

    def accepting(query: dns.message.Message, _transport: str) -> bytes:
        assert query.opcode() == dns.opcode.UPDATE
        return query.to_wire()[:2] + b"\xa8\0" + bytes(8)  # no sections at all (RFC 2136 3.8)

    with server(pod.far, V4["far"], script=accepting) as upstream, proxy(pod.pod, **settings(at(V4["far"]))):
        with stub(pod, V4["far"]) as asking:
            asking.sock.send(update.to_wire())
            assert asking.sock.recv(512)[2:4] == b"\xa8\0"
        assert len(upstream.seen) == 1


def test_dnsmasq_behind_the_proxy_answers_as_by_itself(pod: Pods) -> None:
    """A server that is not ours; what it leaves out or writes otherwise would show."""
    options = ["--port=5356", "--no-hosts", "--no-resolv", "--conf-file=/dev/null", "--pid-file=", "--keep-in-foreground"]
    records = [
        "--host-record=host.test,198.18.0.7",
        "--txt-record=txt.test,words",
        "--cname=alias.test,host.test",
        "--user=root",
    ]
    records += ["--mx-host=test,mail.test,10", "--auth-ttl=60", "--local-ttl=60", "--local=/test/"]
    running = subprocess.Popen(["ip", "netns", "exec", pod.far, "dnsmasq", *options, *records])
    try:
        with (
            proxy(pod.pod, **settings(at(V4["far"], 5356))),
            stub(pod, V4["far"]) as captured,
            stub(pod, V4["far"], 5356) as direct,
        ):
            until_answered(direct.sock)
            for name, kind in (
                ("host.test", "A"),
                ("host.test", "AAAA"),
                ("txt.test", "TXT"),
                ("test", "MX"),
                ("gone.test", "A"),
            ):
                for _ in range(2):
                    for ask in (captured.ask, captured.ask_tcp):
                        found, wanted = ask(name, kind, use_edns=0), direct.ask(name, kind, use_edns=0)
                        assert (found.answer, found.rcode()) == (wanted.answer, wanted.rcode())
    finally:
        running.terminate()
        running.wait()


def until_answered(sock: socket.socket) -> None:
    """Ask until somebody answers."""
    deadline = time.monotonic() + DEADLINE_S
    sock.settimeout(0.1)
    while True:
        try:
            sock.send(dns.message.make_query("ready.test", "A").to_wire())
            sock.recv(512)
        except (TimeoutError, ConnectionRefusedError):
            assert time.monotonic() < deadline
        else:
            sock.settimeout(DEADLINE_S)
            return


def test_no_such_name_and_no_such_type_are_remembered(pod: Pods) -> None:
    with server(pod.far, V4["far"]) as upstream, proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as client:
        for _ in range(2):
            assert client.ask("no.test").rcode() == dns.rcode.NXDOMAIN
            empty = client.ask("v4.test", "AAAA")
            assert (empty.rcode(), empty.answer) == (dns.rcode.NOERROR, [])
        assert len(upstream.seen) == 2


@pytest.mark.parametrize("first", ["A", "AAAA"])
def test_a_name_with_addresses_of_one_family_is_there_for_the_other(pod: Pods, first: str) -> None:
    """Some servers say that a name is not there when only its AAAA is not (RFC 4074 4.2)."""

    def wrong(query: dns.message.Message, transport: str) -> dns.message.Message:
        return negative(query, rcode=3) if query.question[0].rdtype.name == "AAAA" else usual(query, transport)

    with server(pod.far, V4["far"], script=wrong), proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as client:
        client.ask("www.test", first)
        client.ask("www.test", "A")
        response = client.ask("www.test", "AAAA")
        assert (response.rcode(), response.answer) == (dns.rcode.NOERROR, [])


def test_an_answer_too_long_for_the_asker_is_cut_and_had_over_tcp(pod: Pods) -> None:
    many = [f"198.18.1.{number}" for number in range(1, 101)]

    def long(query: dns.message.Message, transport: str) -> dns.message.Message:
        made = answer(query, dns.rrset.from_text(query.question[0].name, 60, "IN", "A", *many))
        if transport == "tcp":
            return made
        made = answer(query)
        made.flags |= dns.flags.TC
        return made

    with server(pod.far, V4["far"], script=long) as upstream, proxy(pod.pod, **settings(at(V4["far"]))):
        with stub(pod, V4["far"]) as client:
            small = client.ask("long.test")
            assert small.flags & dns.flags.TC
            assert not small.answer
            large = client.ask("long.test", use_edns=0, payload=4096)
            assert not large.flags & dns.flags.TC
            assert len(values(large)) == len(values(client.ask_tcp("long.test"))) == 100
        assert [transport for _, transport, _ in upstream.seen] == ["udp", "tcp"]


def test_a_cut_answer_that_cannot_be_had_over_tcp_is_passed_on(pod: Pods) -> None:
    def cut(query: dns.message.Message, transport: str) -> dns.message.Message | None:
        made = answer(query)
        made.flags |= dns.flags.TC
        return made if transport == "udp" else None

    with (
        server(pod.far, V4["far"], script=cut) as upstream,
        proxy(pod.pod, **settings(at(V4["far"]))),
        stub(pod, V4["far"]) as asking,
    ):
        for _ in range(4):  # nor is the resolver taken for dead, or such an answer kept
            response = asking.ask("long.test")
            assert (response.rcode(), bool(response.flags & dns.flags.TC)) == (dns.rcode.NOERROR, True)
        assert [transport for _, transport, _ in upstream.seen] == ["udp", "tcp"] * 4


def test_edns_goes_through_and_is_not_told_to_those_who_do_not_know_it(pod: Pods) -> None:
    with server(pod.far, V4["far"]) as upstream, proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as client:
        fresh = client.ask("www.test", use_edns=0, payload=1400)
        assert upstream.seen[0][0].payload == 1400
        cached = client.ask("www.test", use_edns=0, payload=1400)
        assert fresh.edns == cached.edns == 0
        assert client.ask("www.test", use_edns=-1).edns == -1
        client.ask("www.test", want_dnssec=True)
        assert client.ask("www.test", want_dnssec=True).ednsflags & dns.flags.DO
        assert len(upstream.seen) == 2


def test_an_answer_for_one_subnet_is_not_for_others(pod: Pods) -> None:
    subnet = dns.edns.ECSOption("198.51.100.0", 24)
    with server(pod.far, V4["far"]) as upstream, proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as client:
        for _ in range(2):
            client.ask("www.test", use_edns=0, options=[subnet])
        assert [query.options for query, _, _ in upstream.seen] == [(subnet,), (subnet,)]


@NETS
def test_hundreds_of_questions_each_way_are_answered_exactly_once(pod: Pods, net: dict[str, str]) -> None:
    count = 300
    with server(pod.far, net["far"]) as upstream, proxy(pod.pod, **settings(at(net["far"]))) as running:
        with stub(pod, net["far"]) as asking, client(pod.pod, net["far"], 53) as stream:
            for number in range(count):
                asking.ask(f"u{number}.test")
                send(stream, dns.message.make_query(f"t{number}.test", "A", id=number).to_wire())
                assert dns.message.from_wire(receive(stream)).id == number
        assert running.stop() == 0
    assert len(upstream.seen) == 2 * count
    assert len({(query.id, port) for query, _, port in upstream.seen}) > count
    assert running.counters["dns_queries"] == {"answered": 2 * count}
    assert {protocol: sum(flow["protocol"] == protocol for flow in running.flows) for protocol in ("udp", "tcp")} == {
        "udp": count,
        "tcp": count,
    }


def test_the_next_resolver_is_asked_when_one_fails_or_is_silent(pod: Pods) -> None:
    def failing(query: dns.message.Message, _transport: str) -> dns.message.Message | None:
        return answer(query, rcode=2) if query.question[0].name.labels[0] == b"fails" else None

    resolvers = (at(V4["far"], 5355), at(V4["far"], 5353), at(V4["far"], 5354))  # nobody, one that fails, a good one
    with (
        server(pod.far, V4["far"], 5353, failing),
        server(pod.far, V4["far"], 5354),
        proxy(pod.pod, **settings(*resolvers)) as running,
        stub(pod, V4["far"]) as client,
    ):
        assert values(client.ask("fails.test")) == ADDRESSES["A"]
        assert values(client.ask("silent.test")) == ADDRESSES["A"]
        assert running.flow(lambda flow: flow["dns"]["name"] == "silent.test")["dns"]["from"] == resolvers[2]


def test_when_all_resolvers_fail_the_asker_is_told(pod: Pods) -> None:
    def failing(query: dns.message.Message, _transport: str) -> dns.message.Message:
        return answer(query, rcode=5)

    with server(pod.far, V4["far"], 5353, failing):
        with proxy(pod.pod, **settings(at(V4["far"], 5355))) as running, stub(pod, V4["far"]) as client:
            assert client.ask("www.test").rcode() == dns.rcode.SERVFAIL
            flow = running.flow()
        assert (flow["reason"], flow["error"]) == ("upstream_failed", "ECONNREFUSED")
        with proxy(pod.pod, **settings(at(V4["far"], 5355), at(V4["far"], 5353))), stub(pod, V4["far"]) as client:
            assert client.ask("www.test").rcode() == dns.rcode.REFUSED


def test_all_resolvers_are_asked_at_once_when_told_so(pod: Pods) -> None:
    """When the first is well, the second hears of nothing otherwise."""
    resolvers = (at(V4["far"], 5353), at(V4["far"], 5354))
    with server(pod.far, V4["far"], 5353), server(pod.far, V4["far"], 5354) as second:
        with proxy(pod.pod, **settings(*resolvers)), stub(pod, V4["far"]) as asking:
            asking.ask("alone.test")
        with proxy(pod.pod, **settings(*resolvers, dns_parallel=True)), stub(pod, V4["far"]) as asking:
            asking.ask("both.test")
            deadline = time.monotonic() + DEADLINE_S
            while not second.seen:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        assert [query.question[0].name.to_text() for query, _, _ in second.seen] == ["both.test."]


def test_those_who_ask_the_same_wait_for_one_answer(pod: Pods) -> None:
    resolver = listen(pod.far, V4["far"], 5353, socket.SOCK_DGRAM)
    with resolver, proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as one, stub(pod, V4["far"]) as other:
        queries = [dns.message.make_query(name, "A") for name in ("www.test", "WWW.test")]
        one.sock.send(queries[0].to_wire())
        question, peer = resolver.recvfrom(512)
        other.sock.send(queries[1].to_wire())
        other.sock.send(dns.message.make_query("next.test", "A").to_wire())
        assert dns.message.from_wire(resolver.recvfrom(512)[0]).question[0].name.to_text() == "next.test."
        made = usual(dns.message.from_wire(question), "udp").to_wire()
        resolver.sendto(made, peer)
        for asker, query in zip((one, other), queries, strict=True):
            response = dns.message.from_wire(asker.sock.recv(512))
            assert response.id == query.id
            assert response.question[0].name.to_text() == query.question[0].name.to_text()
            assert values(response) == ADDRESSES["A"]


def test_those_who_wait_together_get_an_answer_that_is_too_long_to_be_kept(pod: Pods) -> None:
    resolver = listen(pod.far, V4["far"], 5353, socket.SOCK_DGRAM)
    with resolver, proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as one, stub(pod, V4["far"]) as other:
        query = dns.message.make_query("long.test", "TXT", payload=8000)
        one.sock.send(query.to_wire())
        question, peer = resolver.recvfrom(512)
        other.sock.send(query.to_wire())
        other.sock.send(dns.message.make_query("next.test", "A").to_wire())
        resolver.recvfrom(512)  # the second was not asked, or it were here
        texts = [f'"{"x" * 200}{number}"' for number in range(25)]
        made = answer(dns.message.from_wire(question), dns.rrset.from_text("long.test.", 60, "IN", "TXT", *texts))
        resolver.sendto(made.to_wire(max_size=8000), peer)
        for asker in (one, other):
            assert values(dns.message.from_wire(asker.sock.recv(8000))) == sorted(texts)


def test_questions_asked_at_once_share_a_few_ports_and_each_has_an_id_of_its_own(pod: Pods) -> None:
    resolver = listen(pod.far, V4["far"], 5353, socket.SOCK_DGRAM)
    queries = [dns.message.make_query(f"n{number}.test", "A") for number in range(3 * USES)]
    with resolver, proxy(pod.pod, **settings(at(V4["far"]))) as running, stub(pod, V4["far"]) as client:
        for query in queries:
            client.sock.send(query.to_wire())
        asked = [resolver.recvfrom(512) for _ in queries]
        for question, peer in reversed(asked):
            resolver.sendto(usual(dns.message.from_wire(question), "udp").to_wire(), peer)
        answers = {response.id: response for response in (dns.message.from_wire(client.sock.recv(512)) for _ in queries)}
        assert all(query.is_response(answers[query.id]) for query in queries)
        assert running.stop() == 0
    by_port = Counter(peer[1] for _, peer in asked)
    assert max(by_port.values()) <= USES
    assert len(by_port) < len(queries)
    assert len({(question[:2], peer) for question, peer in asked}) == len(queries)


def test_a_port_on_which_somebody_guesses_is_given_up(pod: Pods) -> None:
    resolver = listen(pod.far, V4["far"], 5353, socket.SOCK_DGRAM)
    with resolver, proxy(pod.pod, **settings(at(V4["far"]))) as running, stub(pod, V4["far"]) as client:
        client.sock.send(dns.message.make_query("www.test", "A").to_wire())
        question, peer = resolver.recvfrom(512)
        for guess in range(MAX_WRONG + 1):
            resolver.sendto((int.from_bytes(question[:2]) ^ 1 + guess).to_bytes(2) + b"\x81\x80" + question[4:], peer)
        assert dns.message.from_wire(client.sock.recv(512)).rcode() == dns.rcode.SERVFAIL
        assert running.flow()["error"] == "answers that fit no question"


def test_what_does_not_fit_the_question_is_not_an_answer(pod: Pods) -> None:
    resolver = listen(pod.far, V4["far"], 5353, socket.SOCK_DGRAM)
    with resolver, proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as client:
        client.sock.send(dns.message.make_query("www.test", "A").to_wire())
        question, peer = resolver.recvfrom(512)
        query = dns.message.from_wire(question)
        forged = usual(query, "udp")
        forged.id ^= 1
        other = dns.message.make_query("www.evil", "A", id=query.id)
        for wrong in (forged.to_wire(), usual(other, "udp").to_wire(), question, b"\0", question[:2]):
            resolver.sendto(wrong, peer)
        right = answer(query, dns.rrset.from_text("www.test.", 60, "IN", "A", "192.0.2.1"))
        resolver.sendto(right.to_wire(), peer)
        assert values(dns.message.from_wire(client.sock.recv(512))) == ["192.0.2.1"]


@pytest.mark.parametrize(
    ("message", "rcode"),
    [
        (b"\x12\x34\x01\x00\x00\x02\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01\x01b\x00\x00\x01\x00\x01", "FORMERR"),
        (b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x3fa", "FORMERR"),
        (dns.message.make_query("test", "AXFR").to_wire(), "NOTIMP"),
    ],
    ids=["two questions", "cut name", "zone transfer"],
)
def test_what_cannot_be_asked_is_answered_with_why(pod: Pods, message: bytes, rcode: str) -> None:
    with proxy(pod.pod, **settings(at(V4["far"]))), stub(pod, V4["far"]) as client:
        client.sock.send(message)
        response = client.sock.recv(512)
    assert response[:2] == message[:2]
    assert dns.rcode.to_text(dns.rcode.Rcode(response[3] & 0xF)) == rcode


def test_unknown_types_and_classes_go_through(pod: Pods) -> None:
    def unknown(query: dns.message.Message, _transport: str) -> dns.message.Message:
        return answer(query, dns.rrset.from_text(query.question[0].name, 60, "IN", "TYPE4711", r"\# 3 010203"))

    with server(pod.far, V4["far"], script=unknown) as upstream, proxy(pod.pod, **settings(at(V4["far"]))):
        with stub(pod, V4["far"]) as client:
            for _ in range(2):
                assert values(client.ask("www.test", "TYPE4711")) == [r"\# 3 010203"]
        assert len(upstream.seen) == 1


@NETS
def test_a_flow_to_an_address_has_the_name_it_was_asked_by(pod: Pods, net: dict[str, str]) -> None:
    kind = "AAAA" if ":" in net["far"] else "A"

    def here(query: dns.message.Message, _transport: str) -> dns.message.Message:
        return answer(query, dns.rrset.from_text(query.question[0].name, 60, "IN", kind, net["far"]))

    with server(pod.far, net["far"], script=here), proxy(pod.pod, **settings(at(net["far"]))) as running:
        with stub(pod, net["far"]) as asking:
            asking.ask("Api.Example.test", kind)
        assert is_reset(pod.pod, net["far"], 7003)
        assert running.flow(lambda flow: flow["direction"] == "outbound")["dns_name"] == "api.example.test"


@NETS
def test_all_workers_know_the_names(pod: Pods, net: dict[str, str]) -> None:
    kind = "AAAA" if ":" in net["far"] else "A"

    def here(query: dns.message.Message, _transport: str) -> dns.message.Message:
        return answer(query, dns.rrset.from_text(query.question[0].name, 60, "IN", kind, net["far"]))

    with server(pod.far, net["far"], script=here), proxy(pod.pod, **settings(at(net["far"])), workers=3) as running:
        with stub(pod, net["far"]) as asking:
            asking.ask("api.example.test", kind)
        for _ in range(24):  # to all workers, as good as certainly
            is_reset(pod.pod, net["far"], 7003)
        assert running.stop() == 0
    names = [flow["dns_name"] for flow in running.flows if flow["direction"] == "outbound"]
    assert names == ["api.example.test"] * 24


@NETS
def test_a_connection_that_was_not_captured_is_refused_and_other_hosts_datagrams_are_dropped(
    pod: Pods, net: dict[str, str]
) -> None:
    with server(pod.far, net["far"]), proxy(pod.pod, **settings(at(net["far"]))) as running:
        assert is_reset(pod.far, net["pod"], DNS)
        with client(pod.far, net["pod"], DNS, socket.SOCK_DGRAM) as outside, stub(pod, net["far"]) as inside:
            outside.send(dns.message.make_query("www.test", "A").to_wire())
            inside.ask("www.test")
            outside.setblocking(False)
            with pytest.raises(BlockingIOError):
                outside.recv(512)
        assert running.stop() == 0
    assert running.counters["connections_refused"] == {"direct_dial": 1, "dns_from_elsewhere": 1}


def test_a_resolver_that_is_the_proxy_itself_is_refused(pod: Pods) -> None:
    given = json.dumps(settings(f"127.0.0.1:{DNS}"))
    program = ["ip", "netns", "exec", pod.pod, sys.executable, "-m", "tests.proxy.serve", given]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == ProxyError.exit_code
    assert f"resolver 127.0.0.1:{DNS}" in done.stderr


def test_the_proxys_own_question_brought_back_to_it_is_not_asked_again(pod: Pods) -> None:
    """Rules that do not know the proxy: its user is another than they think."""
    with pods("dnsloop") as looping:
        looping.rules(REDIRECT_RULES)
        with (
            server(looping.far, V4["far"], 53),
            proxy(looping.pod, **settings(at(V4["far"], 53)), run_as=[4711, 4711]) as running,
        ):
            with stub(looping, V4["far"]) as client:
                assert client.ask("www.test").rcode() == dns.rcode.SERVFAIL
            assert running.stop() == 0
        assert running.counters["connections_refused"]["dns_loop"] <= 2


def test_a_client_that_asks_half_a_question_costs_nothing(pod: Pods) -> None:
    with server(pod.far, V4["far"]), proxy(pod.pod, **settings(at(V4["far"]))) as running:
        with client(pod.pod, V4["far"], 53) as sock:
            sock.sendall(b"\0")
        with client(pod.pod, V4["far"], 53) as sock:
            sock.sendall(b"\0\x20half")
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        with client(pod.pod, V4["far"], 53) as sock:
            send(sock, b"", dns.message.make_query("www.test", "A").to_wire())
            assert values(dns.message.from_wire(receive(sock))) == ADDRESSES["A"]
        assert running.stop() == 0
    assert json.dumps(running.counters["connections_refused"]) == '{"dns_malformed": 1}'
