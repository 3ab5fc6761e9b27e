"""Each request to the kernel, and each program, is refused once: enable does all of it, or raises and has changed nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from interceptor import capture, release
from interceptor.backends import surroundings
from interceptor.backends.base import Observed
from interceptor.errors import BackendError
from interceptor.netns import entered
from interceptor.plan.model import PolicyRoute
from tests.rig.capturing import capturing, enable, options
from tests.rig.kernel import snapshot
from tests.rig.net import Pod, pods
from tests.rig.refusing import each_refused

OLD = {"exclude_outbound_ports": "1-70,9999", "dns": "all"}
NEW = {"inbound": "tproxy", "exclude_uids": "5-9", "udp": "tproxy"}
pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.parametrize(
        "backend",
        ["nft", *(pytest.param(name, marks=pytest.mark.torture) for name in ("iptables-nft", "iptables-legacy", "libiptc"))],
    ),
]


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods(1) as (made,):
        yield made


def held(pod: Pod) -> dict[str, str]:
    """All that the kernel holds; nft lists iptables-nft's chains as they were made, iptables-save by name."""
    found = snapshot(pod)
    found["nft -a list ruleset"] = "\n".join(sorted(found["nft -a list ruleset"].splitlines()))
    return found


def policy_routes(pod: Pod) -> tuple[PolicyRoute, ...]:
    """Those of ours that stand there."""
    with entered(pod.path):
        return surroundings.standing_routes()


def assert_stands(pod: Pod, texts: dict[str, str], about: str) -> None:
    """What `texts` asks for is captured; other rules of ours may be left."""
    found = capture.check(options(**texts), netns=pod.name).differences
    assert [each for each in found if each.kind != "extra"] == [], about


def test_the_first_time(pod: Pod, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = held(pod)
    texts = {"backend": backend, **NEW}
    for number, why in each_refused(lambda: enable(pod, **texts), monkeypatch):
        if why and capture.STANDS not in why:
            assert held(pod) == before, f"call {number}: {why}"
        else:
            assert_stands(pod, texts, f"call {number}: {why}")
            capture.disable(netns=pod.name)


def test_reconfiguring(pod: Pod, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = {"backend": backend, **OLD}, {"backend": backend, **NEW}
    with capturing(pod, **old):
        before = held(pod)
        for number, why in each_refused(lambda: enable(pod, **new), monkeypatch):
            if why and capture.STANDS not in why:
                assert held(pod) == before, f"call {number}: {why}"
            else:
                assert_stands(pod, new, f"call {number}: {why}")
                capture.disable(netns=pod.name)  # else the old rules would keep what the new ones may have captured
                enable(pod, **old)


def not_today(_self: object) -> Observed:
    raise BackendError("not today")


@pytest.mark.parametrize("first", [{}, OLD], ids=["the-first-time", "reconfiguring"])
def test_what_cannot_be_read_back(first: dict[str, str], pod: Pod, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with capturing(pod, backend=backend, **first) if first else nullcontext():
        before = held(pod)
        with monkeypatch.context() as patched:
            kind = type(release.backend(backend))
            patched.setattr(kind, "observe", not_today)
            patched.setattr(kind, "holds", lambda _self, _plan: False)
            with pytest.raises(BackendError, match="not today") as raised:
                enable(pod, backend=backend, **NEW)
        if backend == "nft" and first:
            assert "the old rules are gone" in str(raised.value)
            assert_stands(pod, {"backend": backend, **NEW}, "the new rules, with their routes")
        else:
            assert held(pod) == before


def test_removing(pod: Pod, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = held(pod)
    old = {"backend": backend, **NEW}
    enable(pod, **old)
    routes = policy_routes(pod)
    assert routes
    for number, why in each_refused(lambda: capture.disable(netns=pod.name), monkeypatch):
        if not why:
            assert held(pod) == empty, f"call {number}"
        elif policy_routes(pod) != routes:
            # Rules go first: none ever marks a packet that has no route.
            assert capture.disable(netns=pod.name).backends == (), f"call {number}: {why}"
        capture.disable(netns=pod.name)
        assert held(pod) == empty, f"call {number}: {why}"
        enable(pod, **old)
    capture.disable(netns=pod.name)
