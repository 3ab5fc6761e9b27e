"""`ip rule`s of others that stand before ours: those that take our packets are told and refused, others left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import pytest

from interceptor import capture
from interceptor.errors import InterceptorError
from tests.rig.capturing import capturing, enable, options
from tests.rig.client import ask
from tests.rig.kernel import snapshot, written
from tests.rig.world import Net, World

TPROXY = {"inbound": "tproxy", "outbound": "tproxy"}
ELSEWHERE = "route add {anywhere} via {far} dev eth0 table 77"
# What stands before ours and takes our packets; each with a route that its table needs.
WINNING = {
    "everything": ("rule add pref 100 lookup 77", ELSEWHERE),
    "our mark": ("rule add pref 100 fwmark 0x539/0xfff lookup 77", ELSEWHERE),
    "a bit of our mark": ("rule add pref 100 fwmark 0x1/0x1 lookup 77", ELSEWHERE),
    "any mark but another": ("rule add pref 100 not fwmark 0x1000/0xf000 lookup 77", ELSEWHERE),
    "a destination": ("rule add pref 100 to {server}/{bits} lookup 77", ELSEWHERE),
    "a protocol": ("rule add pref 100 ipproto tcp lookup 77", ELSEWHERE),
    "unreachable": ("rule add pref 100 unreachable", None),
    "main": ("rule add pref 100 lookup main", None),
    "past ours": ("rule add pref 100 goto 32766", None),
}
HARMLESS = {
    "an empty table": ("rule add pref 100 lookup 77", None),
    "another mark": ("rule add pref 100 fwmark 0x200/0xf00 lookup 77", ELSEWHERE),
    "any mark but ours": ("rule add pref 100 not fwmark 0x539/0xfff lookup 77", ELSEWHERE),
    "this host": ("rule add pref 100 lookup local", None),
    "behind ours": ("rule add pref 1338 lookup 77", ELSEWHERE),
    "a table that says to look further": ("rule add pref 100 lookup 77", "route add throw default table 77"),
    "no default route": ("rule add pref 100 lookup 77 suppress_prefixlength 0", ELSEWHERE),
    "the next rule": ("rule add pref 100 goto 1000", None),
}


@contextmanager
def standing(w: World, net: Net, rule: str, route: str | None) -> Iterator[None]:
    """The rule and its route, of another's, in the pod."""
    lines = [line.format(**asdict(net)) for line in (route, rule) if line is not None]
    for line in lines:
        w.pod.run("ip", f"-{net.family[1]}", *line.split())
    try:
        yield
    finally:
        for line in reversed(lines):
            w.pod.run("ip", f"-{net.family[1]}", *line.replace(" add ", " del ").split())


@pytest.mark.parametrize("kind", WINNING)
def test_a_rule_that_takes_our_packets_is_told_and_refused(kind: str, w: World, net: Net) -> None:
    config = options(**TPROXY)
    with capturing(w.pod, **TPROXY):
        assert ask(w.pod, net.at("server")).by == "outbound"
        with standing(w, net, *WINNING[kind]):
            found = capture.check(config, netns=w.pod.name).differences
            before = written(w.pod)
            with pytest.raises(InterceptorError, match=f"IP{net.family} rule .* stands before ours .*Nothing was changed"):
                enable(w.pod, **TPROXY)
            assert before.is_untouched_in(written(w.pod))
            went = ask(w.pod, net.at("server")).by
        assert capture.check(config, netns=w.pod.name).differences == ()
    assert [(item.kind, item.where) for item in found] == [("extra", "policy route")]
    assert went != "outbound"


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_rule_that_takes_none_of_our_packets_is_left_alone(kind: str, w: World, net: Net) -> None:
    rule, route = HARMLESS[kind]
    with standing(w, net, rule, route):
        before = snapshot(w.pod)
        with capturing(w.pod, **TPROXY):
            assert capture.check(options(**TPROXY), netns=w.pod.name).differences == ()
            assert ask(w.pod, net.at("server")).by == "outbound"
        assert snapshot(w.pod) == before


def test_a_rule_of_our_priority_wins_when_it_was_there_first(w: World, net: Net) -> None:
    rule, route = "rule add pref 1337 lookup 77", ELSEWHERE
    with standing(w, net, rule, route):
        before = snapshot(w.pod)
        with pytest.raises(InterceptorError, match=f"IP{net.family} rule 1337: from all lookup 77 stands before ours"):
            enable(w.pod, **TPROXY)
        assert snapshot(w.pod) == before
    with capturing(w.pod, **TPROXY), standing(w, net, rule, route):
        assert capture.check(options(**TPROXY), netns=w.pod.name).differences == ()
        assert ask(w.pod, net.at("server")).by == "outbound"
