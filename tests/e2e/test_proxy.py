"""`init` and `proxy` together, as a user starts them: two pods, real connections through the real proxy, both directions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.place import NETS, Place, at, interceptor
from tests.rig.client import REFUSED, Answer, ask
from tests.rig.net import Pod
from tests.rig.sockets import open_socket, split

pytestmark = pytest.mark.netns
MODES = [
    pytest.param([], id="redirect"),
    pytest.param(["--outbound", "tproxy", "--inbound", "tproxy"], id="tproxy"),
    pytest.param(["--original-source"], id="redirect, original source"),
    pytest.param(["--inbound", "tproxy", "--original-source"], id="tproxy, original source"),
]


@contextmanager
def proxied(pod: Pod, options: list[str]) -> Iterator[list[dict[str, object]]]:
    """init and a running proxy in `pod`; after the block the list holds the flow records."""
    subprocess.run(interceptor("init", "--netns", pod.name, *options), check=True, capture_output=True)
    argv = interceptor("proxy", "--netns", pod.name, *options)
    flows: list[dict[str, object]] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as proxy:
        assert proxy.stderr is not None
        assert "listening" in proxy.stderr.readline()
        try:
            yield flows
        finally:
            proxy.send_signal(signal.SIGTERM)
            stdout, stderr = proxy.communicate(timeout=20)
            flows += [json.loads(line) for line in stdout.splitlines()]
    assert proxy.returncode == 0, stderr


@pytest.mark.default_relay
@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("options", MODES)
def test_both_directions_arrive_and_are_reported(place: Place, options: list[str], family: str) -> None:
    own, other, inbound_source = NETS[family]

    with proxied(place.pod, options) as flows:
        going = ask(place.pod, at(other))
        coming = ask(place.far, at(own), uid=0)

    assert going == Answer("far", at(other))
    assert coming == Answer("app", at(own))
    assert coming.peer.rsplit(":", 1)[0].strip("[]") == (other if "--original-source" in options else inbound_source)
    flows.sort(key=lambda flow: str(flow["time"]))  # each worker writes its own batches
    assert [(flow["direction"], flow["original_dst"], flow["reason"]) for flow in flows] == [
        ("outbound", at(other), "closed"),
        ("inbound", at(own), "closed"),
    ]
    assert all(flow["bytes_received"] for flow in flows)
    assert [flow["uid"] for flow in flows] == [1000, 1000], "the client's, then the application's"


DATAGRAMS = [
    pytest.param(["--udp", "tproxy"], id="from 127.0.0.6"),
    pytest.param(["--udp", "tproxy", "--original-source"], id="redirect, original source"),
    pytest.param(["--udp", "tproxy", "--original-source", "--outbound", "off"], id="inbound alone, original source"),
    pytest.param(["--udp", "tproxy", "--original-source", "--inbound", "tproxy"], id="tproxy, original source"),
    pytest.param(["--udp", "tproxy", "--original-source", "--backend", "iptables-nft"], id="iptables, original source"),
]


@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("options", DATAGRAMS)
def test_datagrams_come_from_the_clients_address_if_asked_for(place: Place, options: list[str], family: str) -> None:
    own, other, inbound_source = NETS[family]
    at_own, client = at(own, 9000), at(other, 4000)
    with (
        proxied(place.pod, options) as flows,
        open_socket(place.pod, socket.SOCK_DGRAM, at_own, uid=1000, source=at_own) as app,
        open_socket(place.far, socket.SOCK_DGRAM, client, source=client) as near,
    ):
        for each in (app, near):
            each.settimeout(5)
        near.connect(split(at_own))
        for number in range(3):
            near.send(b"question %d" % number)
            question, peer = app.recvfrom(100)
            app.sendto(b"answer to " + question, peer)
            assert near.recv(100) == b"answer to question %d" % number
    assert peer[0] == (other if "--original-source" in options else inbound_source)
    assert peer[1] != 4000
    [flow] = flows
    assert (flow["direction"], flow["client"], flow["original_dst"]) == ("inbound", client, at_own)
    assert (flow["bytes_sent"], flow["bytes_received"]) == (30, 60)


@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("options", DATAGRAMS)
def test_a_client_hears_that_no_application_takes_its_datagrams(place: Place, options: list[str], family: str) -> None:
    own, other, _ = NETS[family]
    with proxied(place.pod, options), open_socket(place.far, socket.SOCK_DGRAM, at(other), source=at(other, 4000)) as near:
        near.settimeout(5)
        near.connect(split(at(own, 9000)))
        near.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            near.recv(100)


@pytest.mark.parametrize("family", NETS)
@pytest.mark.parametrize("options", MODES)
def test_call_to_its_own_pods_address_stays_direct(place: Place, options: list[str], family: str) -> None:
    own = NETS[family][0]
    with proxied(place.pod, options) as flows:
        answer = ask(place.pod, at(own))

    assert answer == Answer("app", at(own))
    assert flows == []


@pytest.mark.parametrize("port", [15001, 15006])
@pytest.mark.parametrize("family", NETS)
def test_direct_dial_is_refused_and_counted_never_a_loop(place: Place, family: str, port: int) -> None:
    own = NETS[family][0]
    with proxied(place.pod, []) as flows:
        answers = [ask(place.pod, at(own, port)), ask(place.far, at(own, port), uid=0)]

    assert {answer.by for answer in answers} <= {"reset", "closed", REFUSED.by}
    assert {str(flow["reason"]).split("_")[0] for flow in flows} == {"refused"}
    assert len(flows) == len(answers)


def test_probe_asks_the_running_proxy(place: Place) -> None:
    with proxied(place.pod, ["--dns", "all"]):
        done = subprocess.run(
            interceptor("probe", "--json", "--netns", place.pod.name, "--dns", "all"),
            capture_output=True,
            text=True,
            check=False,
        )

    outbound = [result["status"] for result in json.loads(done.stdout) if result["direction"] == "outbound"]
    assert outbound == ["ok", "ok"]
    assert done.returncode == 0, done.stdout


@pytest.mark.default_relay
@pytest.mark.parametrize("reader", ["gone", "stuck", "disk full"])
def test_flow_log_that_nobody_takes_stops_no_connection(place: Place, reader: str) -> None:
    other = NETS["v4"][1]
    subprocess.run(interceptor("init", "--netns", place.pod.name), check=True, capture_output=True)
    reading, writing = os.pipe()
    stdout = os.open("/dev/full", os.O_WRONLY) if reader == "disk full" else writing
    if reader == "stuck":
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"." * 4096)
        os.set_blocking(writing, True)
    with subprocess.Popen(
        interceptor("proxy", "--netns", place.pod.name), stdout=stdout, stderr=subprocess.PIPE, text=True
    ) as proxy:
        assert proxy.stderr is not None
        assert "listening" in proxy.stderr.readline()
        if reader == "gone":
            os.close(reading)

        answers = {ask(place.pod, at(other)) for _ in range(20)}

        proxy.send_signal(signal.SIGTERM)
        proxy.communicate(timeout=20)
    for descriptor in {writing, stdout} | ({reading} if reader != "gone" else set()):
        os.close(descriptor)
    assert answers == {Answer("far", at(other))}
    assert proxy.returncode == 0
