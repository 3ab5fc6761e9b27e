"""Each request to the kernel, and each program, is refused once: enable does all of it, or raises and has changed nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyroute2
import pytest

from interceptor import capture
from interceptor.backends import netlink, process, surroundings
from interceptor.backends import routes as policy
from interceptor.errors import BackendError, InterceptorError
from interceptor.netns import entered
from interceptor.plan.model import PolicyRoute
from tests.rig.capturing import capturing, enable, options
from tests.rig.kernel import snapshot
from tests.rig.net import Pod, pods

OLD = {"exclude_outbound_ports": "1-70,9999", "dns": "all"}
NEW = {"inbound": "tproxy", "exclude_uids": "5-9", "udp": "tproxy"}
MOST_CALLS = 400
pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.parametrize(
        "backend",
        ["nft", "iptables-nft", *(pytest.param(name, marks=pytest.mark.torture) for name in ("iptables-legacy", "libiptc"))],
    ),
]


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods(1) as (made,):
        yield made


class Refusing:
    """Counts calls that ask something of the kernel; the one that it is told fails before it has done anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
        self.calls = 0
        self.refused = refused
        refusal = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        for module, name, error in (
            (netlink, "request", refusal),
            (netlink, "transaction", refusal),
            (pyroute2, "IPRoute", refusal),
            (policy, "_change_rule", BackendError("adding a rule: refused")),
            (policy, "_change_route", BackendError("adding a route: refused")),
            (process, "run", BackendError("cannot be started")),
        ):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name), error))

    def _counted(self, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self.refused:
                raise error
            return function(*arguments, **named)

        return call


def each_refused(verb: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, str]]:
    """Do `verb` again and again, another call refused each time: its number, and what was said; ends when none was refused."""
    for number in range(MOST_CALLS):
        with monkeypatch.context() as patched:
            refusing = Refusing(patched, number)
            why = refused(verb)
        yield number, why
        if refusing.calls <= number:
            assert why == ""
            return
    raise AssertionError(f"more than {MOST_CALLS} calls")


def refused(verb: Callable[[], object]) -> str:
    """Why it was not done; "" when it was."""
    try:
        verb()
    except InterceptorError as error:
        return str(error)
    return ""


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
