"""--before-proxy bypass as a pod's life goes: rules, an init container, the proxy, the application; and what ends nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.e2e.place import NETS, Place, at, interceptor
from tests.rig.client import REFUSED, Answer, Question, ask, connected, wait_until
from tests.rig.net import Pod
from tests.rig.servers import Server, serving

pytestmark = [pytest.mark.netns, pytest.mark.default_relay]
ROOT = Path(__file__).parents[2]
BYPASS = ("--before-proxy", "bypass")


@dataclass(slots=True)
class Running:
    """A real proxy. `flows`: how many connections it took, once it has ended."""

    process: subprocess.Popen[str]
    flows: int = -1


@contextmanager
def running_proxy(pod: Pod, *options: str) -> Iterator[Running]:
    """`interceptor proxy` in `pod`, told nothing of --before-proxy; it listens when the block begins."""
    argv = interceptor("proxy", "--netns", pod.name, *options)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()
        running = Running(process)
        try:
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=20)
            running.flows = len(stdout.splitlines())
    assert process.returncode == 0, stderr


def run(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(interceptor(*arguments), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout


def announced(pod: Pod) -> bool:
    """What `check` says; it finds nothing wrong either way."""
    return bool(json.loads(run("check", "--netns", pod.name, *BYPASS, "--json"))["announced"])


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("family", NETS)
def test_direct_before_the_proxy_captured_after_it_and_never_let_go(place: Place, family: str, workers: str) -> None:
    pod, far = place.pod, at(NETS[family][1])
    run("init", "--netns", pod.name, *BYPASS)
    with connected(Question(pod, far)) as (early, answer):
        assert answer == Answer("far", far)
        assert not announced(pod)
        with running_proxy(pod, "--workers", workers) as proxy:
            assert announced(pod)
            assert ask(pod, far) == Answer("far", far)
        assert proxy.flows == 1, "the application's; the early one went by"
        # Whoever can bring the proxy down gets nowhere by it.
        assert ask(pod, far) == REFUSED
        assert "unchanged" in run("init", "--netns", pod.name, *BYPASS)
        run("init", "--netns", pod.name, *BYPASS, "--exclude-uids", "5")
        assert ask(pod, far) == REFUSED
        with running_proxy(pod) as proxy:
            assert ask(pod, far) == Answer("far", far)
        assert proxy.flows == 1
        early.sendall(b"still here")
        assert early.recv(64) == b"still here"


def test_a_running_proxy_announces_itself_to_rules_that_are_new(place: Place) -> None:
    pod, far = place.pod, at(NETS["v4"][1])
    with running_proxy(pod) as proxy:
        run("init", "--netns", pod.name, *BYPASS)
        wait_until(lambda: announced(pod), "it announces itself again", 20)
        assert ask(pod, far) == Answer("far", far)
    assert proxy.flows == 1


def test_another_proxys_hook_announces_it(place: Place) -> None:
    pod = place.pod
    run("init", "--netns", pod.name, *BYPASS)
    in_pod = ("ip", "netns", "exec", pod.name, "setpriv", "--clear-groups", "--reuid=1000", "--regid=1000")
    done = subprocess.run([*in_pod, *interceptor("announce")], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "no rule here waits for a proxy of uid 1000, gid 1000: nothing has changed\n"
    assert not announced(pod)
    assert run("announce", "--netns", pod.name) == "announced: outbound traffic is captured from now on\n"
    assert announced(pod)


def test_the_documented_hook_waits_for_the_proxy_and_announces_it(place: Place) -> None:
    pod, far = place.pod, at(NETS["v6"][1])
    hook = yaml.safe_load(re.search(r"```yaml\n(lifecycle:.*?)```", (ROOT / "docs/cni.md").read_text(), re.DOTALL)[1])
    command = hook["lifecycle"]["postStart"]["exec"]["command"]
    run("init", "--netns", pod.name, "--backend", "iptables-nft", *BYPASS)
    in_pod = ("ip", "netns", "exec", pod.name, "setpriv", "--clear-groups", "--reuid=1337", "--regid=1337")
    with subprocess.Popen([*in_pod, *command]) as running:
        assert ask(pod, far) == Answer("far", far)
        assert running.poll() is None
        with serving() as servers:
            servers.listen(Server("proxy", pod, uid=1337), 15001)
            assert running.wait(20) == 0
            assert ask(pod, far) == Answer("proxy", far)


def test_probe_does_not_take_direct_traffic_for_a_failure(place: Place) -> None:
    pod = place.pod
    run("init", "--netns", pod.name, *BYPASS)
    found = {path["direction"]: path["status"] for path in json.loads(run("probe", "--netns", pod.name, *BYPASS, "--json"))}
    assert found == {"outbound": "not probed", "inbound": "ok", "self-call": "ok"}
    assert not announced(pod), "a probe is no proxy"
    run("announce", "--netns", pod.name)
    assert {path["status"] for path in json.loads(run("probe", "--netns", pod.name, *BYPASS, "--json"))} == {"ok"}
