"""DEL ends well whatever is missing; CHECK sees content; STATUS and GC."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cni.launcher import launcher
from tests.cni.calling import Binary
from tests.cni.conftest import STATIC
from tests.rig.kernel import snapshot, written
from tests.rig.net import Pod

REMOVED = ("prevResult",)


def test_del_gives_the_namespace_back_as_it_was(binary: Binary, pod: Pod) -> None:
    before = snapshot(pod)
    assert binary.call("ADD", pod.path).status == 0
    done = binary.call("DEL", pod.path)
    assert (done.status, done.stdout) == (0, b"")
    assert snapshot(pod) == before


def test_del_can_be_repeated_and_needs_no_add(binary: Binary, pod: Pod) -> None:
    assert [binary.call("DEL", pod.path).status for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("netns", [None, "", "/run/netns/never-was", "/proc/4194303/ns/net"])
@pytest.mark.parametrize("previous", [None, {}, "kept"], ids=["none", "empty", "whole"])
def test_del_without_a_namespace_ends_well(binary: Binary, netns: str | None, previous: Any) -> None:
    config = binary.config() if previous == "kept" else binary.config(prevResult=previous)
    done = binary.call("DEL", netns, config)
    assert (done.status, done.stdout) == (0, b"")


def test_del_with_a_null_previous_result_ends_well(binary: Binary, pod: Pod) -> None:
    config = {**binary.config(), "prevResult": None}
    assert binary.call("DEL", pod.path, config).status == 0


@pytest.mark.parametrize("kind", ["file", "fifo", "directory"])
def test_del_of_what_was_left_in_a_namespaces_place_ends_well(binary: Binary, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "netns"
    {"file": path.touch, "fifo": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()
    assert binary.call("DEL", str(path)).status == 0


def test_del_in_the_runtimes_own_namespace_touches_nothing(binary: Binary) -> None:
    # A pid that was reused since.
    before = snapshot(binary.runtime)
    assert binary.call("DEL", binary.runtime.path).status == 0
    assert snapshot(binary.runtime) == before


@pytest.mark.parametrize("leads_to", [None, "nothing", "runtime"])
def test_del_of_a_path_that_is_no_utf8_ends_well(binary: Binary, tmp_path: Path, leads_to: str | None) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    if leads_to is not None:
        path.symlink_to(binary.runtime.path if leads_to == "runtime" else leads_to)
    assert binary.call("DEL", str(path)).status == 0


@pytest.mark.parametrize("path", [b"/no/\xff", b"/no/\\ud800"], ids=repr)
def test_del_by_an_agent_at_no_possible_path_ends_well(runtime: Pod, pod: Pod, path: bytes) -> None:
    binary = Binary((str(STATIC),), runtime)
    config = json.dumps(binary.config()).encode()[:-1] + b', "agentSocket": "' + path + b'"}'
    assert binary.call("DEL", pod.path, config).status == 0


def test_del_needs_not_the_configuration_of_the_add(binary: Binary, pod: Pod) -> None:
    before = snapshot(pod)
    assert binary.call("ADD", pod.path, binary.config(capture={"backend": "nft", "outbound_port": 15101})).status == 0
    assert binary.call("DEL", pod.path, binary.config(capture={"colour": "red"}, onFailure="whatever")).status == 0
    assert snapshot(pod) == before


def test_del_after_a_failed_add_ends_well(binary: Binary, pod: Pod) -> None:
    before = snapshot(pod)
    assert binary.call("ADD", pod.path, binary.config(prevResult=None)).code == 7
    assert binary.call("DEL", pod.path, binary.config(prevResult=None)).status == 0
    assert snapshot(pod) == before


def test_check_of_a_captured_pod_succeeds_and_changes_nothing(binary: Binary, pod: Pod) -> None:
    assert binary.call("ADD", pod.path).status == 0
    before = written(pod)
    done = binary.call("CHECK", pod.path)
    assert (done.status, done.stdout) == (0, b"")
    assert before.is_untouched_in(written(pod))


@pytest.mark.parametrize(
    "damage",
    [
        ("delete", "table", "inet", "interceptor"),
        ("flush", "table", "inet", "interceptor"),
        ("flush", "chain", "inet", "interceptor", "nat_output"),
        ("insert", "rule", "inet", "interceptor", "nat_output", "accept"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_check_sees_damage(binary: Binary, pod: Pod, damage: tuple[str, ...]) -> None:
    assert binary.call("ADD", pod.path).status == 0
    pod.run("nft", *damage)
    done = binary.call("CHECK", pod.path)
    assert done.code == 102
    assert done.object["details"]


def test_check_sees_another_configuration(binary: Binary, pod: Pod) -> None:
    assert binary.call("ADD", pod.path).status == 0
    assert binary.call("CHECK", pod.path, binary.config(capture={"backend": "nft", "outbound_port": 15101})).code == 102


def test_check_leaves_others_rules_alone(binary: Binary, pod: Pod) -> None:
    assert binary.call("ADD", pod.path).status == 0
    pod.run("nft", "-f", "-", stdin="table inet portmap { chain x { type filter hook input priority 0; accept; }; }")
    assert binary.call("CHECK", pod.path).status == 0


def test_check_needs_a_previous_result_and_a_namespace(binary: Binary, pod: Pod) -> None:
    assert binary.call("CHECK", pod.path, binary.config(prevResult=None)).code == 7
    assert binary.call("CHECK", "/run/netns/never-was").code == 8


def test_status_needs_no_variable(binary: Binary) -> None:
    done = binary.call("STATUS", "", binary.config("1.1.0", prevResult=None), CNI_CONTAINERID="", CNI_IFNAME=None)
    assert (done.status, done.stdout) == (0, b"")


def test_status_says_what_is_wrong_with_the_entry(binary: Binary) -> None:
    assert binary.call("STATUS", None, binary.config("1.1.0", capture={"colour": "red"})).code == 7


def test_status_says_that_nothing_can_be_pinned(runtime: Pod, tmp_path: Path) -> None:
    path = tmp_path / "interceptor-cni"
    path.write_text(launcher())
    path.chmod(0o755)
    without = Binary(("unshare", "-m", "sh", "-ec", 'mount -t tmpfs none /sys/fs/bpf; exec "$0"', str(path)), runtime)
    wanted = {"outbound": "connect", "inbound": "off", "capture_cgroup": "/"}
    done = without.call("STATUS", None, without.config("1.1.0", capture=wanted, prevResult=None))
    assert done.code == 50
    assert "/sys/fs/bpf is no bpffs" in done.object["details"]


def test_status_does_not_wait_for_a_cgroup(binary: Binary) -> None:
    # It may be a pod that makes it, one that is not captured: with a node that is not ready it would not start.
    config = binary.config("1.1.0", capture={"backend": "nft", "proxy_cgroup": "nowhere"}, prevResult=None)
    assert binary.call("STATUS", None, config).status == 0


@pytest.mark.parametrize("attachments", [{}, {"cni.dev/valid-attachments": None}, {"cni.dev/attachments": []}])
def test_gc_takes_nothing_from_a_pod(binary: Binary, pod: Pod, attachments: dict[str, Any]) -> None:
    assert binary.call("ADD", pod.path).status == 0
    before = written(pod)
    done = binary.call(
        "GC", None, binary.config("1.1.0", prevResult=None, **attachments), CNI_CONTAINERID=None, CNI_IFNAME=None
    )
    assert (done.status, done.stdout) == (0, b"")
    assert before.is_untouched_in(written(pod))
