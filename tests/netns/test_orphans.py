"""Rules of ours whose program is gone: an image without nft or iptables takes over a namespace, or cleans it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interceptor import capture, netns
from interceptor.backends import orphans, process
from interceptor.errors import BackendError
from tests.rig.capturing import capturing, enable, options
from tests.rig.client import Answer, ask
from tests.rig.foreign import add_foreign_rules
from tests.rig.kernel import snapshot
from tests.rig.world import NETS, World, world

PROGRAM = {"nft": "nft", "iptables-nft": "iptables-nft-save"}
TPROXY = {"inbound": "tproxy", "outbound": "tproxy", "udp": "tproxy"}


@pytest.fixture(scope="module")
def host() -> Iterator[World]:
    with world() as built:
        add_foreign_rules(built.pod)
        for net in NETS.values():
            ask(built.pod, net.at("server"))
        yield built


def uninstall(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    installed = process.find
    monkeypatch.setattr(process, "find", lambda program: None if program.startswith(programs) else installed(program))


@pytest.mark.parametrize("backend", ["nft", "iptables-nft"])
@pytest.mark.parametrize("texts", [{}, TPROXY], ids=["default", "tproxy"])
def test_clean_needs_no_program(backend: str, texts: dict[str, str], host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(host.pod)
    enable(host.pod, backend=backend, **texts)
    with monkeypatch.context() as patch:
        uninstall(patch, backend if backend == "nft" else "ip")
        removed = capture.disable(netns=host.pod.name)
    assert removed.backends == (backend,)
    assert snapshot(host.pod) == before


@pytest.mark.parametrize(("first", "second"), [("nft", "iptables-legacy"), ("iptables-nft", "nft"), ("nft", "iptables-nft")])
def test_another_backend_takes_over(first: str, second: str, host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(host.pod)
    with capturing(host.pod, backend=first), monkeypatch.context() as patch:
        uninstall(patch, "nft" if first == "nft" else ("iptables-nft"))
        found = capture.check(options(backend=second), netns=host.pod.name).differences
        assert any((difference.kind, difference.where) == ("extra", first) for difference in found)
        assert enable(host.pod, backend=second).removed == (first,)
        assert capture.check(options(backend=second), netns=host.pod.name).differences == ()
        for net in NETS.values():
            assert ask(host.pod, net.at("server")) == Answer("outbound", net.at("server"))
    assert snapshot(host.pod) == before


@pytest.mark.iptables
def test_strays_go_along_and_are_named(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(host.pod)
    enable(host.pod, backend="iptables-nft")
    host.pod.run("iptables-nft", "-t", "nat", "-I", "OUTPUT", "-p", "udp", "-j", "INTERCEPT_OUTBOUND")
    with monkeypatch.context() as patch:
        uninstall(patch, "ip")
        removed = capture.disable(netns=host.pod.name)
    assert [warning for warning in removed.warnings if "v4 nat/OUTPUT" in warning and "INTERCEPT_OUTBOUND" in warning]
    assert snapshot(host.pod) == before


@pytest.mark.iptables
def test_what_cannot_be_taken_whole_stays_whole(host: World) -> None:
    with capturing(host.pod, backend="iptables-nft"):
        # Through a map, which only nft can write, and we do not look into.
        host.pod.run("nft", "add rule ip nat OUTPUT meta l4proto vmap { udp : jump INTERCEPT_OUTBOUND }")
        before = host.pod.run("nft", "list", "ruleset")
        with netns.entered(host.pod.path), pytest.raises(BackendError, match="Nothing was changed"):
            orphans.remove()
        assert host.pod.run("nft", "list", "ruleset") == before
        host.pod.run("nft", "flush", "chain", "ip", "nat", "OUTPUT")


@pytest.mark.iptables
def test_legacy_tables_that_cannot_be_read_are_told(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "iptables-legacy", "ip6tables-legacy")
    monkeypatch.setattr("interceptor.backends.detect._has_python_iptables", lambda: False)
    assert [warning for warning in capture.disable(netns=host.pod.name).warnings if "iptables-legacy tables" in warning]
