"""Pods without their rules are found and healed, labelled or deleted; what is open stays open; the host is never touched."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from cni.agent.node import find_namespaces
from interceptor import capture
from interceptor.netns import entered
from tests.cni.agents import agent, resident_bytes, wait_until
from tests.cni.calling import CONTAINER, Binary
from tests.cni.conftest import STATIC
from tests.cni.test_add import CONFIG, is_captured
from tests.cni.test_agent import fetch, shim
from tests.rig.kernel import snapshot
from tests.rig.kube_api import Api as FakeApi
from tests.rig.kube_api import kube_api
from tests.rig.net import Pod, pods, wire

HTTP = ("--http", "127.0.0.1:15014")
ENTRY = {"type": "interceptor-cni", "capture": {"backend": "nft"}, "agentSocket": "/x", "kubernetes": {}}
ADDRESSES = ("10.9.0.1", "10.9.0.2")
DAMAGES = [
    pytest.param(("nft", "delete", "table", "inet", "interceptor"), id="deleted"),
    pytest.param(("nft", "flush", "table", "inet", "interceptor"), id="flushed"),
    pytest.param(("nft", "insert", "rule", "inet", "interceptor", "nat_output", "accept"), id="inserted"),
    pytest.param(("ip", "-6", "addr", "del", "::6/128", "dev", "lo"), id="address"),
]


@pytest.fixture
def fake(runtime: Pod, tmp_path: Path) -> Iterator[FakeApi]:
    with kube_api(runtime, tmp_path) as api:
        yield api


def kube_options(fake: FakeApi, folder: Path) -> tuple[str, ...]:
    entry = folder / "entry.json"
    entry.write_text(json.dumps({"name": "podnet", "plugins": [{"type": "bridge"}, ENTRY]}))
    api = ("--kube-api", fake.url, "--kube-token", fake.token_file, "--kube-ca", fake.ca_file, "--node", "node-1")
    return (*HTTP, *api, "--entry", str(entry))


def metrics(runtime: Pod) -> list[str]:
    return fetch(runtime, "http://127.0.0.1:15014/metrics")[1].splitlines()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pod_that_lost_its_rules_is_healed(runtime: Pod, tmp_path: Path, pod: Pod, damage: tuple[str, ...]) -> None:
    with agent(runtime, tmp_path, *HTTP) as running:
        assert shim(running, runtime).call("ADD", pod.path).status == 0
        pod.run(*damage)
        assert running.wait_for("drifted")["pod"] == CONTAINER
        assert running.wait_for("healed")["pod"] == CONTAINER
        assert is_captured(pod)
        wait_until(lambda: 'interceptor_cni_repairs_total{result="healed"} 1' in metrics(runtime))
        assert 'interceptor_cni_pods{state="captured"} 1' in metrics(runtime)


def test_what_the_last_agent_captured_is_healed_by_the_next(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    with agent(runtime, tmp_path) as running:
        capturing = {"backend": "nft", "outbound_port": 15101}
        binary = shim(running, runtime)
        assert binary.call("ADD", pod.path, binary.config(capture=capturing)).status == 0
        before = snapshot(pod)
    pod.run("nft", "delete", "table", "inet", "interceptor")
    with agent(runtime, tmp_path, name="second"):
        wait_until(lambda: snapshot(pod)["nft -a list ruleset"] == before["nft -a list ruleset"])


def test_a_deleted_pod_is_not_healed(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    empty = snapshot(pod)
    with agent(runtime, tmp_path) as running, pods(1) as (other,):
        binary = shim(running, runtime)
        for each in (pod, other):
            assert binary.call("ADD", each.path, CNI_CONTAINERID=each.name).status == 0
        assert binary.call("DEL", pod.path, CNI_CONTAINERID=pod.name).status == 0
        # The other's healing shows that a round has passed.
        other.run("nft", "delete", "table", "inet", "interceptor")
        running.wait_for("healed")
        assert snapshot(pod) == empty


def test_a_pod_that_was_left_alone_is_left_alone(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    empty = snapshot(pod)
    with agent(runtime, tmp_path) as running, pods(1) as (other,):
        binary = shim(running, runtime)
        off = binary.config(capture={"backend": "nft", "outbound": "off", "inbound": "off"})
        assert binary.call("ADD", pod.path, off, CNI_CONTAINERID=pod.name).status == 0
        assert binary.call("ADD", other.path).status == 0
        other.run("nft", "delete", "table", "inet", "interceptor")
        running.wait_for("healed")
        assert snapshot(pod) == empty


@contextmanager
def listening(pod: Pod, port: int) -> Iterator[socket.socket]:
    with entered(pod.path):
        listener = socket.create_server(("0.0.0.0", port))
    with listener:
        yield listener


def connect(pod: Pod, listeners: dict[str, socket.socket]) -> tuple[str, socket.socket, socket.socket]:
    """Connect from `pod` to the remote's port 80: which listener got it, the client's end, the server's."""
    with entered(pod.path):
        client = socket.create_connection((ADDRESSES[1], 80), timeout=10)
    ready, _, _ = select.select(list(listeners.values()), [], [], 10)
    name = next(name for name, listener in listeners.items() if listener in ready)
    return name, client, listeners[name].accept()[0]


def passes(client: socket.socket, server: socket.socket) -> bool:
    client.sendall(b"x")
    server.settimeout(10)
    return server.recv(1) == b"x"


def test_healing_keeps_open_connections_and_captures_new_ones(runtime: Pod, tmp_path: Path) -> None:
    with pods(2) as (app, remote), agent(runtime, tmp_path) as running:
        wire(app, remote, ("eth0", "eth0"), ([f"{ADDRESSES[0]}/24"], [f"{ADDRESSES[1]}/24"]))
        assert shim(running, runtime).call("ADD", app.path).status == 0
        with listening(app, 15001) as proxy, listening(remote, 80) as server:
            listeners = {"proxy": proxy, "remote": server}
            name, captured, at_proxy = connect(app, listeners)
            assert name == "proxy"
            # SIGSTOP: what happens between a loss and its healing can be looked at.
            os.kill(running.process.pid, 19)
            app.run("nft", "delete", "table", "inet", "interceptor")
            name, leaked, at_remote = connect(app, listeners)
            assert name == "remote"
            os.kill(running.process.pid, 18)
            wait_until(lambda: is_captured(app))
            assert passes(captured, at_proxy)
            assert passes(leaked, at_remote)
            name, again, at_proxy_again = connect(app, listeners)
            assert name == "proxy"
            for each in (captured, at_proxy, leaked, at_remote, again, at_proxy_again):
                each.close()


@contextmanager
def process_of(uid: str, pod: Pod) -> Iterator[int]:
    """A process in the cgroup of the pod `uid` and in the namespace of `pod`; its pid."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2" or (mount[2] == "cgroup" and "pids" in mount[3]))
    above = root / f"itc-t-{os.getpid()}-{uid}"
    folder = above / f"kubepods-burstable-pod{uid.replace('-', '_')}.slice"
    folder.mkdir(parents=True)
    with entered(pod.path):
        running = subprocess.Popen(["sleep", "120"])
    try:
        (folder / "cgroup.procs").write_text(str(running.pid))
        yield running.pid
    finally:
        running.kill()
        running.wait()

        def removed() -> bool:
            try:
                folder.rmdir()
            except OSError:  # until the kernel has buried the process
                return False
            return True

        wait_until(removed)
        above.rmdir()


@pytest.fixture
def predating(fake: FakeApi, pod: Pod) -> Iterator[str]:
    """A pod that runs since before there was a plugin; its uid."""
    uid = str(uuid4())
    pod.run("ip", "addr", "add", "10.9.0.7/32", "dev", "lo")
    with process_of(uid, pod):
        fake.pod("web", metadata={"uid": uid}, status={"phase": "Running", "podIP": "10.9.0.7", "podIPs": [{"ip": "10.9.0.7"}]})
        yield uid


def test_a_pod_that_predates_the_plugin_is_captured(
    runtime: Pod, tmp_path: Path, pod: Pod, fake: FakeApi, predating: str
) -> None:
    host = snapshot(runtime)
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path)):
        wait_until(lambda: is_captured(pod))
        events = wait_until(lambda: fake.all("events"))
        assert [(event["reason"], event["involvedObject"]["uid"]) for event in events] == [("CaptureHealed", predating)]
    assert snapshot(runtime) == host


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"hostNetwork": True}},
        {"metadata": {"annotations": {"interceptor.io/capture": "false"}}},
        {"spec": {"containers": [{"name": "app"}]}},
        {"status": {"phase": "Running", "podIP": "10.9.0.99"}},
        {"status": {"phase": "Succeeded", "podIP": "10.9.0.7"}},
        {"status": {"phase": "Pending"}},
    ],
    ids=["host-network", "opted-out", "no-proxy", "another-address", "ended", "no-address"],
)
def test_a_predating_pod_that_needs_none_gets_none(
    runtime: Pod, tmp_path: Path, pod: Pod, fake: FakeApi, predating: str, change: dict[str, dict[str, object]]
) -> None:
    empty = snapshot(pod)
    status = {"phase": "Running", "podIP": "10.9.0.7"}
    fake.pod("web", **{"status": status, **change, "metadata": {"uid": predating, **change.get("metadata", {})}})
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path)) as running, pods(1) as (other,):
        binary = shim(running, runtime)
        assert binary.call("ADD", other.path).status == 0
        running.wait_for("synced")
        other.run("nft", "delete", "table", "inet", "interceptor")
        running.wait_for("healed")
        assert snapshot(pod) == empty


def test_a_process_in_the_hosts_namespace_is_no_way_to_a_pod(runtime: Pod) -> None:
    uid = str(uuid4())
    with process_of(uid, runtime) as pid:
        assert find_namespaces({uid: ["10.9.0.7"]}) == {}
        runtime.run("ip", "addr", "add", "10.9.0.7/32", "dev", "lo")
        assert find_namespaces({uid: ["10.9.0.7"]}) == {uid: f"/proc/{pid}/ns/net"}
        runtime.run("ip", "addr", "del", "10.9.0.7/32", "dev", "lo")


@pytest.mark.parametrize("mode", ["label", "delete", "off"])
def test_other_modes_leave_the_rules_alone(
    runtime: Pod, tmp_path: Path, pod: Pod, fake: FakeApi, predating: str, mode: str
) -> None:
    empty = snapshot(pod)
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path), "--repair", mode) as running:
        running.wait_for("synced")
        match mode:
            case "label":
                wait_until(
                    lambda: "interceptor.io/uncaptured" in (fake.get("pods", "shop", "web") or {})["metadata"].get("labels", {})
                )
            case "delete":
                wait_until(lambda: fake.get("pods", "shop", "web") is None)
        assert snapshot(pod) == empty
    assert [line for line in running.log() if line["event"] in ("healed", "bug")] == []


def test_what_cannot_be_healed_is_told_and_counted(
    runtime: Pod, tmp_path: Path, pod: Pod, fake: FakeApi, predating: str
) -> None:
    fake.pod(
        "web",
        metadata={"uid": predating, "annotations": {"interceptor.io/dns": "maybe"}},
        status={"phase": "Running", "podIP": "10.9.0.7"},
    )
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path)) as running:
        assert "interceptor.io/dns" in running.wait_for("not_repaired")["error"]
        assert wait_until(lambda: fake.all("events"))[0]["reason"] == "CaptureFailed"
        assert 'interceptor_cni_repairs_total{result="failed"} 1' in metrics(runtime)


def test_an_add_is_decided_by_the_pods_objects(runtime: Pod, tmp_path: Path, pod: Pod, fake: FakeApi) -> None:
    fake.pod("web", metadata={"annotations": {"interceptor.io/outbound-port": "15101"}})
    fake.pod("plain", spec={"containers": [{"name": "app"}]})
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path)) as running, pods(1) as (plain,):
        binary = shim(running, runtime)
        config = binary.config(kubernetes={})
        for each, name in ((pod, "web"), (plain, "plain")):
            arguments = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name}"
            assert binary.call("ADD", each.path, config, CNI_ARGS=arguments, CNI_CONTAINERID=name).status == 0
        assert "redirect to :15101" in pod.run("nft", "list", "ruleset")
        assert plain.run("nft", "list", "ruleset") == ""
        requests = {line["container"]: line for line in running.log() if line["event"] == "request"}
        assert (requests["plain"]["decision"], requests["plain"]["reason"]) == ("skip", "it has no proxy container")


def test_an_expired_token_does_not_keep_the_agents_own_pod_out(runtime: Pod, tmp_path: Path, pod: Pod, fake: FakeApi) -> None:
    fake.tokens = set()
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path)) as running:
        binary = shim(running, runtime)
        arguments = "K8S_POD_NAMESPACE=interceptor;K8S_POD_NAME=interceptor-cni-x2b4k"
        assert binary.call("ADD", pod.path, binary.config(kubernetes={}), CNI_ARGS=arguments).status == 0
        fake.tokens = {"good"}
        uid = fake.pod("web")["metadata"]["uid"]
        arguments = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID={uid}"
        assert binary.call("ADD", pod.path, binary.config(kubernetes={}), CNI_ARGS=arguments, timeout_s=40).status == 0
    assert is_captured(pod)


def test_an_entry_that_needs_the_api_is_refused_by_an_agent_without(runtime: Pod, tmp_path: Path, pod: Pod) -> None:
    with agent(runtime, tmp_path) as running:
        binary = Binary((str(STATIC),), runtime, running.socket_path)
        done = binary.call("ADD", pod.path, binary.config(kubernetes={}), CNI_ARGS="K8S_POD_NAMESPACE=a;K8S_POD_NAME=b")
        assert done.code == 7
        assert "--kube-api" in done.object["details"]


def test_the_taint_goes_when_the_agent_is_ready(runtime: Pod, tmp_path: Path, fake: FakeApi) -> None:
    taint = {"key": "interceptor.io/not-ready", "effect": "NoSchedule"}
    fake.put("nodes", {"metadata": {"name": "node-1"}, "spec": {"taints": [taint]}})
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path), "--untaint") as running:
        running.wait_for("untainted")
    assert (fake.get("nodes", "", "node-1") or {})["spec"]["taints"] == []


def test_500_pods_fit_into_45_mb(runtime: Pod, tmp_path: Path, fake: FakeApi) -> None:
    # 8 KiB an object: what kubectl applied last, and a few variables for each container.
    extra = {"kubectl.kubernetes.io/last-applied-configuration": "x" * 4096}
    variables = [{"name": f"V{number}", "value": "x" * 80} for number in range(40)]
    for number in range(500):
        fake.pod(
            f"web-{number}",
            metadata={"annotations": {**extra, "interceptor.io/dns": "all"}},
            spec={"containers": [{"name": "interceptor-proxy", "env": variables}]},
        )
    with agent(runtime, tmp_path, *kube_options(fake, tmp_path)) as running:
        assert running.wait_for("synced")["pods"] == 500
        for number in range(500):  # and all of them change
            fake.pod(f"web-{number}", metadata={"annotations": {**extra, "interceptor.io/dns": "off"}})
        assert resident_bytes(running.process.pid) < 45 << 20


def test_a_fingerprint_changes_with_the_rules_alone(pod: Pod) -> None:
    capture.enable(CONFIG, netns=pod.name)
    before = capture.fingerprint(netns=pod.name)
    assert before is not None
    capture.check(CONFIG, netns=pod.name)
    capture.enable(CONFIG, netns=pod.name)
    assert capture.fingerprint(netns=pod.name) == before
    pod.run("nft", "add", "table", "inet", "other")
    assert capture.fingerprint(netns=pod.name) != before
