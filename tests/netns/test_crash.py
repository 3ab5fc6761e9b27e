"""kill -9 at every change that enable and disable make: nothing that was captured leaks, and the next verb mends it.

On nft, moreover, the rules are the old ones or the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interceptor import capture
from interceptor.backends.nft import NftBackend
from interceptor.netns import entered
from tests.rig.capturing import capturing, enable, options
from tests.rig.client import LOST, LOST_S, Answer, Question, ask_all
from tests.rig.crashing import crashes
from tests.rig.kernel import snapshot
from tests.rig.world import NETS, World

OLD = {"exclude_outbound_ports": "1-70,9999", "dns": "all"}
NEW = {"inbound": "tproxy", "exclude_uids": "5-9", "udp": "tproxy"}
MOST_STEPS = 120
# libiptc.py only gives iptables.py another way to save and restore: `make torture` kills it, too.
pytestmark = pytest.mark.parametrize(
    "backend", ["nft", "iptables-nft", "iptables-legacy", pytest.param("libiptc", marks=pytest.mark.torture)], scope="module"
)


def assert_no_leak(w: World, backend: str, step: int) -> None:
    """Nothing goes around the proxy, by v4 or v6. nft goes on capturing; iptables may hold traffic back instead."""
    captured = [
        answer for net in NETS.values() for answer in (Answer("outbound", net.at("server")), Answer("inbound", net.at("pod")))
    ]
    questions = [
        question
        for net in NETS.values()
        for question in (Question(w.pod, net.at("server")), Question(w.far, net.at("pod"), uid=0))
    ]
    if backend == "nft":
        assert ask_all(questions) == captured, f"step {step}"
        return
    answers = ask_all(questions, timeout_s=LOST_S)
    assert all(answer in (LOST, wanted) for answer, wanted in zip(answers, captured, strict=True)), f"step {step}: {answers}"


def test_reconfiguring(w: World, backend: str) -> None:
    old, new = {"backend": backend, **OLD}, {"backend": backend, **NEW}
    for step in crashes_from(w, old, "enable", new):
        assert_no_leak(w, backend, step)
        if backend == "nft":
            assert nft_holds(w, OLD) or nft_holds(w, NEW), f"step {step}"
        assert_mended(w, new if step % 2 else old)


def test_enabling_the_first_time(w: World, backend: str) -> None:
    before = snapshot(w.pod)
    new = {"backend": backend, **NEW}
    for step in crashes(w.pod.name, "enable", new, MOST_STEPS):
        if backend == "nft":
            assert nft_holds(w, None) or nft_holds(w, NEW), f"step {step}"
        if step % 3 == 1:
            assert_mended(w, new)
        capture.disable(netns=w.pod.name)
        assert snapshot(w.pod) == before, f"step {step}"
    capture.disable(netns=w.pod.name)


def test_disabling(w: World, backend: str) -> None:
    before = snapshot(w.pod)
    old = {"backend": backend, **NEW}
    for step in crashes_from(w, old, "disable", {}):
        if backend == "nft":
            assert nft_holds(w, None) or nft_holds(w, NEW), f"step {step}"
        capture.disable(netns=w.pod.name)
        assert snapshot(w.pod) == before, f"step {step}"


@pytest.mark.iptables
def test_changing_the_backend(w: World, backend: str) -> None:
    old, new = {"backend": "iptables-nft" if backend == "nft" else "nft", **OLD}, {"backend": backend, **OLD}
    for step in crashes_from(w, old, "enable", new):
        assert_no_leak(w, backend, step)
        assert_mended(w, new if step % 2 else old)


def crashes_from(w: World, old: dict[str, str], verb: str, texts: dict[str, str]) -> Iterator[int]:
    """As crashes(), each time from the state that `old` asks for."""
    with capturing(w.pod, **old):
        for step in crashes(w.pod.name, verb, texts, MOST_STEPS):
            yield step
            enable(w.pod, **old)


def nft_holds(w: World, texts: dict[str, str] | None) -> bool:
    """Whether our nft table is exactly the plan's; None: is not there."""
    with entered(w.pod.path):
        found = NftBackend().observe()
    if texts is None:
        return not found.chains
    plan = capture.prepare(options(backend="nft", **texts), netns=w.pod.name).plan
    return found == NftBackend().expected(plan)


def assert_mended(w: World, texts: dict[str, str]) -> None:
    """The next enable brings everything to what it asks for."""
    enable(w.pod, **texts)
    assert capture.check(options(**texts), netns=w.pod.name).differences == ()
