"""The table as bytes is the table as text: nft, which knows nothing of us, lists both alike, and so does the kernel."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor import capture, netns
from interceptor.backends import nft_load, process
from interceptor.backends.nft_load import Loadable
from interceptor.config import Config
from interceptor.plan.build import build_plan
from interceptor.plan.model import Plan
from interceptor.render import nft, nft_bytes
from interceptor.render.nft_bytes import RuleBytes
from interceptor.render.nft_expressions import NFT_JUMP, verdict
from tests.golden import cases
from tests.property.strategies import configs, facts
from tests.rig.capturing import options
from tests.rig.net import Pod, pods

LIST = ("nft", "--stateless", "--numeric-priority", "list", "ruleset")
MANY_PORTS = ",".join(str(port) for port in range(1, 6000, 2))
MANY_CIDRS = ",".join(f"10.{high}.{low}.0/24" for high in range(6) for low in range(0, 256, 2))
LONG = {
    "many-ports": options(exclude_outbound_ports=MANY_PORTS, include_inbound_ports=f"{MANY_PORTS},65000-65535"),
    "many-cidrs": options(exclude_outbound_cidrs=f"{MANY_CIDRS},fd00::/9", exclude_inbound_cidrs=f"{MANY_CIDRS},0.0.0.0/8"),
    "ends": options(
        exclude_outbound_ports="1,65535", exclude_uids="0-5,4294967294", exclude_outbound_cidrs="0.0.0.0/1,::/1,f000::/4"
    ),
    "one-of-each": options(exclude_outbound_ports="443", exclude_uids="7-9", exclude_inbound_cidrs="10.0.0.0/15,fd00::/13"),
}
PLANS = {name: cases.plan(name) for name, config in cases.CASES.items() if config.proxy_cgroup is None}
PLANS |= {name: build_plan(config, cases.HOST) for name, config in LONG.items()}
RELEASE, CGROUP_MATCH = tuple(map(int, os.uname().release.split(".")[:2])), (5, 13)
PLAN = PLANS["before-proxy-tproxy"]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Pod, Pod]]:
    """Two namespaces: what nft loads, and what we load."""
    with pods(2) as (one, other):
        yield one, other


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pods(1) as (made,):
        yield made


def loadable(plan: Plan) -> Loadable:
    return Loadable(nft_bytes.table(plan, {}))


def load(pod: Pod, wanted: Loadable, *, replacing: bool = False) -> None:
    with netns.entered(pod.path):
        nft_load.load(wanted, replacing=replacing)


def holds(pod: Pod, wanted: Loadable) -> bool:
    with netns.entered(pod.path):
        return nft_load.holds(wanted)


def agree(by_text: Pod, by_bytes: Pod, plan: Plan) -> None:
    by_text.run("nft", "-f", "-", stdin=f"flush ruleset\n{nft.script(plan)}")
    by_bytes.run("nft", "flush", "ruleset")

    load(by_bytes, loadable(plan))

    assert by_bytes.run(*LIST) == by_text.run(*LIST)
    # Each time anew, for what was once found equal is remembered.
    assert holds(by_bytes, loadable(plan))
    # nft 1.1 says some things by other expressions, and lists them alike: then the text decides.
    assert holds(by_text, loadable(plan)) or by_text.run("nft", "--version").split()[1] >= "v1.1"


@pytest.mark.parametrize("name", PLANS)
def test_nft_lists_what_was_loaded_as_bytes_as_it_lists_the_text(name: str, pair: tuple[Pod, Pod]) -> None:
    agree(*pair, PLANS[name])


@given(data=st.data(), config=configs(proxy_cgroup=None))
def test_so_it_does_for_any_configuration(pair: tuple[Pod, Pod], data: st.DataObject, config: Config) -> None:
    agree(*pair, build_plan(config, data.draw(facts(config))))


def test_a_cgroup_is_loaded_by_its_number(pod: Pod) -> None:
    plan, number = cases.plan("proxy-cgroup"), os.stat("/sys/fs/cgroup").st_ino
    wanted = Loadable(nft_bytes.table(plan, {"kubepods/pod1/proxy": number}))
    other = Loadable(nft_bytes.table(plan, {"kubepods/pod1/proxy": number + 1}))

    if RELEASE < CGROUP_MATCH:
        with pytest.raises(OSError, match="not supported"):
            load(pod, wanted)
        return
    load(pod, wanted)

    assert (holds(pod, wanted), holds(pod, other)) == (True, False)


def test_one_that_stands_is_replaced_whole(pod: Pod) -> None:
    before, after = loadable(PLAN), loadable(PLANS["many-cidrs"])
    load(pod, before)

    load(pod, after, replacing=True)

    assert (holds(pod, before), holds(pod, after)) == (False, True)


@pytest.mark.parametrize("replacing", [False, True])
def test_a_refused_transaction_leaves_what_was_there(replacing: bool, pod: Pod) -> None:
    if replacing:
        load(pod, loadable(PLAN))
    before, table = pod.run(*LIST), nft_bytes.table(PLANS["default"], {})
    chain = list(table.rules)[-1]
    nowhere = RuleBytes(verdict(NFT_JUMP, "nowhere"), b"")
    broken = Loadable(nft_bytes.TableBytes(table.chains, table.timeouts, table.sets, {**table.rules, chain: (nowhere,)}))

    with pytest.raises(OSError, match="No such file"):
        load(pod, broken, replacing=replacing)

    assert pod.run(*LIST) == before


def test_a_table_that_nobody_told_of_is_not_replaced(pod: Pod) -> None:
    load(pod, loadable(PLAN))

    with pytest.raises(FileExistsError):
        load(pod, loadable(PLANS["default"]))

    assert holds(pod, loadable(PLAN))


IN = "inet interceptor mangle_tproxy_in"
TAMPERED = {
    "a verdict": f'replace rule {IN} handle HANDLE meta l4proto udp counter drop comment "captured inbound"',
    "a comment": f'replace rule {IN} handle HANDLE meta l4proto udp counter goto mangle_tproxy_inbound comment "x"',
    "an inversion": "replace rule inet interceptor mangle_mark_virtual handle ANNOUNCED "
    'meta mark & 0 == @announced counter return comment "the proxy is not ready yet"',
    "a rule less": f"delete rule {IN} handle HANDLE",
    "a rule more": f"add rule {IN} counter",
    "a rule first": f"insert rule {IN} accept",
    "a chain more": "add chain inet interceptor another",
    "a policy": "chain inet interceptor nat_output { type nat hook output priority -101; policy drop; }",
    "a set more": "add set inet interceptor another { type mark; }",
    "a timeout more": "add ct timeout inet interceptor another { protocol tcp; policy = { close : 5 }; }",
    "dormant": "add table inet interceptor { flags dormant; }",
    "no table": "delete table inet interceptor",
}


def first_handle(pod: Pod, chain: str) -> str:
    listed = pod.run("nft", "-a", "list", "chain", "inet", "interceptor", chain)
    return next(line.rpartition("# handle ")[2] for line in listed.splitlines() if "comment" in line)


@pytest.mark.parametrize("what", TAMPERED)
def test_whatever_was_changed_is_seen(what: str, pod: Pod) -> None:
    wanted = loadable(PLAN)
    load(pod, wanted)
    assert holds(pod, wanted)
    script = TAMPERED[what].replace("HANDLE", first_handle(pod, "mangle_tproxy_in"))

    pod.run("nft", "-f", "-", stdin=script.replace("ANNOUNCED", first_handle(pod, "mangle_mark_virtual")) + "\n")

    assert not holds(pod, wanted)


def test_packets_that_were_counted_and_an_announcement_are_no_change(pod: Pod) -> None:
    wanted = loadable(PLAN)
    load(pod, wanted)
    assert holds(pod, wanted)

    pod.run("bash", "-c", "(: > /dev/tcp/127.0.0.1/9) 2> /dev/null || true")
    pod.run("nft", "add", "element", "inet", "interceptor", "announced", "{ 0x0 }")

    assert "packets 0" not in pod.run("nft", "list", "chain", "inet", "interceptor", "timeout_output")
    assert holds(pod, wanted)


def test_no_program_is_started(pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = tmp_path / "nft"
    fails.write_text("#!/bin/sh\nexit 9\n")
    fails.chmod(stat.S_IRWXU)
    monkeypatch.setattr(process, "SEARCH_PATH", str(tmp_path))
    config, other = options(backend="nft"), options(backend="nft", dns="all")

    assert capture.enable(config, netns=pod.name).changed
    assert not capture.enable(config, netns=pod.name).changed
    assert capture.check(config, netns=pod.name).differences == ()
    assert capture.enable(other, netns=pod.name).changed
    assert capture.check(other, netns=pod.name).differences == ()
    assert capture.disable(netns=pod.name).changed
