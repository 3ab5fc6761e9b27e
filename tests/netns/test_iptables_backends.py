"""iptables-nft, iptables-legacy and libiptc on a real kernel: what they write, leave alone, and put back on failure."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Literal

import pytest

from interceptor import netns
from interceptor.backends import cttimeout, surroundings
from interceptor.backends.base import compare
from interceptor.backends.iptables import IptablesBackend, Programs, Tool
from interceptor.backends.libiptc import Libiptc, LibiptcBackend
from interceptor.config import Config
from interceptor.errors import BackendError
from interceptor.plan.build import build_plan
from interceptor.plan.model import HostFacts, Plan, TimeoutPolicy
from interceptor.values import Family, parse_cidrs, parse_ids, parse_ports, parse_uid_rules

pytestmark = [pytest.mark.netns, pytest.mark.slow]

NUMBERS = itertools.count()
BACKENDS = {
    "iptables-nft": lambda: IptablesBackend("nft"),
    "iptables-legacy": lambda: IptablesBackend("legacy"),
    "libiptc": LibiptcBackend,
}
TOOLS: dict[str, Tool] = {"iptables-nft": Programs("nft"), "iptables-legacy": Programs("legacy"), "libiptc": Libiptc()}
EVEN_PORTS = ",".join(str(7000 + 2 * step) for step in range(20))
CONFIGS = {
    "default": Config(),
    "tproxy": Config(outbound="tproxy", inbound="tproxy", udp="tproxy", dns="all"),
    "v4-block": Config(ip_family="v4", uncovered_family="block", dns="resolv-conf"),
    "v4-bypass": Config(ip_family="v4", uncovered_family="bypass"),
    "ports": Config(
        exclude_outbound_ports=parse_ports(f"22,6000-6100,{EVEN_PORTS}"),
        exclude_inbound_ports=parse_ports(f"1,2,3,{EVEN_PORTS}"),
    ),
    "uids": Config(
        include_uids=parse_ids("1000-2000,5", None),
        exclude_uids=parse_ids("70000,80000-90000", None),
        exclude_outbound_for_uids=parse_uid_rules("tcp:80,443:7;8", None),
    ),
    "interfaces": Config(virtual_interfaces=("docker0",), exclude_interfaces=("eth9",)),
    "original-source": Config(original_source=True, exclude_outbound_cidrs=parse_cidrs("10.0.0.0/8,192.168.1.1,fd00::/8")),
    "log": Config(log_rules=True, drop_invalid=True, inbound="tproxy", exclude_inbound_cidrs=parse_cidrs("10.1.0.0/16")),
}
FACTS = HostFacts(resolvers=(ipaddress.ip_network("10.96.0.10/32"), ipaddress.ip_network("fd00::10/128")))
PLANS = {name: build_plan(config, FACTS) for name, config in CONFIGS.items()}
SAVES = [f"{program}-{variant}-save -c" for variant in ("nft", "legacy") for program in ("iptables", "ip6tables")]
SURROUNDINGS = ["ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "ip addr"]


class Killed(BaseException):
    """Stands for kill -9 between two transactions."""


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    name = f"itc-ipt-{os.getpid()}-{next(NUMBERS)}"
    run(f"ip netns add {name}")
    try:
        with netns.entered(f"/run/netns/{name}"):
            run("ip link set lo up")
            yield
    finally:
        run(f"ip netns del {name}")


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(name: str) -> IptablesBackend:
    return BACKENDS[name]()


def run(command: str, stdin: str = "") -> str:
    done = subprocess.run(command.split(), input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def snapshot(*, counters: bool = True) -> dict[str, list[str]]:
    """All that must be the same afterwards. Empty legacy tables, which only the kernel takes away, are left out."""
    commands = [*(SAVES if counters else [save.removesuffix(" -c") for save in SAVES]), *SURROUNDINGS, "nft list ruleset"]
    return {
        command: list(without_empty_tables(run(command)) if "-save" in command else run(command).splitlines())
        for command in commands
    } | {"conntrack timeouts": [policy.value + family.value for policy, family in cttimeout.present()]}


def without_empty_tables(text: str) -> Iterator[str]:
    section: list[str] = []
    for line in text.splitlines():
        if line.startswith("*"):
            section = []
        if not line.startswith("#"):
            section.append(line)
        if line == "COMMIT" and any(not (item[0] in "*C" or (item[0] == ":" and " ACCEPT " in item)) for item in section):
            yield from section


def rule_handles() -> list[str]:
    return run("nft -a list ruleset").splitlines() + [line for save in SAVES for line in without_empty_tables(run(save))]


def add_foreign_rules() -> None:
    """Rules of others in the very chains that ours use, with counts, in both variants and families."""
    for program, address, other in (("iptables", "127.0.0.1", "10.7.7.7"), ("ip6tables", "::1", "fd07::7")):
        for variant in ("nft", "legacy"):
            tool = f"{program}-{variant}"
            for table, chain in (("raw", "OUTPUT"), ("mangle", "PREROUTING"), ("nat", "OUTPUT"), ("nat", "POSTROUTING")):
                run(f"{tool} -t {table} -A {chain} -d {address} -m comment --comment foreign")
            run(f"{tool} -t nat -N FOREIGN")
            run(f"{tool} -t nat -A FOREIGN -d {other} -p tcp -j RETURN")
            run(f"{tool} -t nat -I PREROUTING -p tcp -j FOREIGN")
            run(f"{tool} -t filter -P FORWARD DROP")
    run("nft -f -", "table inet foreign { chain out { type filter hook output priority 5; counter; }\n}\n")
    run("ip rule add priority 1400 fwmark 0x77 lookup 77")
    run("ip route add local default dev lo table 133")
    run("ip -6 route add local default dev lo table 133")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock6:
        for _ in range(3):
            sock.sendto(b"counted", ("127.0.0.1", 9))
            sock6.sendto(b"counted", ("::1", 9))


def enable(backend: IptablesBackend, plan: Plan) -> None:
    surroundings.prepare(plan)
    backend.apply(plan)
    surroundings.tidy(plan)


def disable(backend: IptablesBackend) -> bool:
    removed = backend.remove()
    surroundings.tidy(None)
    return removed


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_apply_gives_what_is_expected_and_a_second_apply_touches_nothing(backend: IptablesBackend, plan: Plan) -> None:
    surroundings.prepare(plan)
    assert backend.apply(plan) is True
    assert compare(backend.expected(plan), backend.observe()) == ()
    before = rule_handles()
    assert backend.apply(plan) is False
    assert rule_handles() == before


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_remove_leaves_everything_of_others_as_it_was(backend: IptablesBackend, plan: Plan) -> None:
    add_foreign_rules()
    before = snapshot()
    enable(backend, plan)
    assert disable(backend) is True
    assert snapshot() == before
    assert disable(backend) is False


def test_remove_in_an_empty_namespace_leaves_an_empty_namespace(backend: IptablesBackend) -> None:
    before = snapshot()
    enable(backend, PLANS["tproxy"])
    disable(backend)
    assert snapshot() == before


@pytest.mark.parametrize(
    "ruleset",
    [
        "table ip nat { }",
        "table ip nat { chain OUTPUT { type nat hook output priority -100; }\n}\n",
        "table ip raw { chain OUTPUT { type filter hook output priority -300; policy drop; }\n}\n",
    ],
    ids=["empty-table", "empty-chain", "policy"],
)
def test_built_in_chains_that_were_there_empty_stay(ruleset: str) -> None:
    run("nft -f -", ruleset)
    before = run("nft list ruleset")
    backend = IptablesBackend("nft")
    backend.apply(PLANS["default"])
    backend.remove()
    assert run("nft list ruleset") == before


def test_a_built_in_chain_made_by_us_stays_once_somebody_uses_it() -> None:
    backend = IptablesBackend("nft")
    backend.apply(PLANS["default"])
    run("iptables-nft -t nat -A OUTPUT -d 10.7.7.7 -j ACCEPT")
    backend.remove()
    assert "ip daddr 10.7.7.7" in run("nft list table ip nat")
    assert "INTERCEPT" not in run("nft list ruleset")


def test_another_plan_replaces_the_first_wholly(backend: IptablesBackend) -> None:
    add_foreign_rules()
    before = snapshot()
    for plan in PLANS.values():
        enable(backend, plan)
        assert compare(backend.expected(plan), backend.observe()) == ()
        assert list(surroundings.differences(plan)) == []
    disable(backend)
    assert snapshot() == before


def test_a_deleted_rule_is_named_and_put_back(backend: IptablesBackend, name: str) -> None:
    plan = PLANS["default"]
    backend.apply(plan)
    variant = "nft" if name == "iptables-nft" else "legacy"
    run(f"iptables-{variant} -t nat -D INTERCEPT_OUTBOUND 3")
    differences = compare(backend.expected(plan), backend.observe())
    assert [(difference.kind, difference.where) for difference in differences] == [("missing", "v4 nat/INTERCEPT_OUTBOUND")]
    assert backend.apply(plan) is True
    assert compare(backend.expected(plan), backend.observe()) == ()


def test_a_changed_conntrack_timeout_is_named_and_put_back() -> None:
    backend = IptablesBackend("legacy")
    plan = PLANS["default"]
    backend.apply(plan)
    spoil_timeout()
    assert {difference.where for difference in compare(backend.expected(plan), backend.observe())} == {
        "v4 conntrack timeout itc4"
    }
    backend.apply(plan)
    assert compare(backend.expected(plan), backend.observe()) == ()


class Failing:
    """The real tool, which at one call does the first `transactions` and then fails as told."""

    def __init__(self, tool: Tool, family: Family, transactions: int, error: BaseException) -> None:
        self.tool, self.family, self.transactions, self.error = tool, family, transactions, error
        self.failed = False

    def opened(self) -> contextlib.AbstractContextManager[None]:
        return self.tool.opened()

    def save(self, family: Family) -> str:
        return self.tool.save(family)

    def tidy(self, family: Family) -> bool:
        return self.tool.tidy(family)

    def restore(self, family: Family, text: str) -> None:
        if family is not self.family or self.failed:
            self.tool.restore(family, text)
            return
        self.failed = True
        sections = text.split("COMMIT\n")[:-1]
        done = "".join(f"{section}COMMIT\n" for section in sections[: self.transactions])
        if done:
            self.tool.restore(family, done)
        raise self.error


# libiptc takes a second each time: one point of failure proves it.
FAILURES = [(name, done) for name in BACKENDS for done in ((1,) if name == "libiptc" else (0, 1, 2))]


@pytest.mark.parametrize(("name", "transactions"), FAILURES)
@pytest.mark.parametrize("family", Family, ids=lambda family: family.value)
@pytest.mark.parametrize("first", ["nothing", "tproxy"])
def test_when_a_family_fails_both_are_put_back(name: str, first: str, family: Family, transactions: int) -> None:
    add_foreign_rules()
    if first != "nothing":
        enable(BACKENDS[name](), PLANS[first])
    before = snapshot(counters=False)
    tool = Failing(TOOLS[name], family, transactions, BackendError("refused by the test"))
    with pytest.raises(BackendError, match="refused by the test"):
        IptablesBackend("legacy", tool).apply(PLANS["log"])
    assert without_counts(snapshot(counters=False)) == without_counts(before)


def without_counts(state: dict[str, list[str]]) -> dict[str, list[str]]:
    # Chains appear in the order of their making in nft's list; iptables-save sorts them.
    return {command: lines if "nft list" not in command else sorted(lines) for command, lines in state.items()}


def test_rules_that_the_kernel_refuses_change_nothing(backend: IptablesBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.setattr(cttimeout, "ensure", lambda _: None)
    with pytest.raises(BackendError):
        backend.apply(PLANS["default"])
    assert snapshot() == before


WATCH = "table ip watch { chain c { type filter hook postrouting priority 300; oifname out0 tcp flags syn counter; }\n}\n"
SWITCHES = [("default", "tproxy"), ("tproxy", "default"), ("tproxy", "original-source")]


@pytest.mark.parametrize("transactions", range(5))
@pytest.mark.parametrize("switch", SWITCHES, ids="-to-".join)
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_killed_while_switching_nothing_leaks_and_the_next_verb_mends_it(
    variant: str, switch: tuple[str, str], transactions: int
) -> None:
    run("ip link add out0 type veth peer name far0")
    run("ip link set far0 up")
    run("ip link set out0 up")
    run("ip addr add 192.0.2.1/24 dev out0")
    run("ip route add default via 192.0.2.254 dev out0")
    run("ip neigh add 192.0.2.254 lladdr 02:00:00:00:00:01 dev out0")
    backend = IptablesBackend(variant)
    old, new = (PLANS[name] for name in switch)
    enable(backend, old)
    run("nft -f -", WATCH)
    connect("203.0.113.1")
    assert leaked() == 0
    surroundings.prepare(new)
    killed = Failing(Programs(variant), Family.V4, transactions, Killed())
    with contextlib.suppress(Killed):
        IptablesBackend(variant, killed).apply(new)
    connect("203.0.113.1")
    assert leaked() == 0
    enable(backend, new)
    assert compare(backend.expected(new), backend.observe()) == ()
    connect("203.0.113.1")
    assert leaked() == 0
    backend.remove()
    assert backend.observe().chains == {}
    assert cttimeout.present() == ()


def test_killed_before_anything_is_in_place_remove_cleans_up(name: str) -> None:
    before = snapshot()
    for transactions in (1, 2):
        killed = Failing(TOOLS[name], Family.V4, transactions, Killed())
        with contextlib.suppress(Killed):
            IptablesBackend("legacy", killed).apply(PLANS["tproxy"])
        BACKENDS[name]().remove()
        assert snapshot() == before


def connect(address: str) -> None:
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex((address, 80))


def leaked() -> int:
    words = run("nft list table ip watch").split()
    return int(words[words.index("packets") + 1])


def spoil_timeout() -> None:
    original = dict(cttimeout.TIMEOUTS[TimeoutPolicy.CAPTURED])
    cttimeout.TIMEOUTS[TimeoutPolicy.CAPTURED]["close"] = 7
    try:
        cttimeout.ensure([(TimeoutPolicy.CAPTURED, Family.V4)])
    finally:
        cttimeout.TIMEOUTS[TimeoutPolicy.CAPTURED].update(original)


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_foreign_rule_before_our_jump_is_named_and_mended(variant: Literal["nft", "legacy"]) -> None:
    """An ACCEPT in front of our jump lets everything past the proxy."""
    backend, plan = IptablesBackend(variant), PLANS["default"]
    backend.apply(plan)
    run(f"iptables-{variant} -t nat -I OUTPUT 1 -p tcp -j ACCEPT")

    found = compare(backend.expected(plan), backend.observe())
    backend.apply(plan)

    assert [str(difference) for difference in found] == ["extra: v4 nat/OUTPUT: (behind 1 of others' rules)"]
    assert compare(backend.expected(plan), backend.observe()) == ()
    assert "-A OUTPUT -p tcp -j ACCEPT" in run(f"iptables-{variant}-save -t nat")


def tool_of(name: str, program: str = "iptables") -> str:
    return f"{program}-{'nft' if name == 'iptables-nft' else 'legacy'}"


STRAYS = ["-p udp -j INTERCEPT_OUTBOUND", "-d 10.0.0.0/8 -p tcp -m owner --uid-owner 7 -g INTERCEPT_OUTBOUND"]


def add_strays(name: str) -> None:
    for stray in STRAYS:
        run(f"{tool_of(name)} -t nat -I OUTPUT 1 {stray}")
    run(f"{tool_of(name, 'ip6tables')} -t nat -N FOREIGN2")
    run(f"{tool_of(name, 'ip6tables')} -t nat -A FOREIGN2 -s fd00::/8 -j INTERCEPT_OUTBOUND")


def test_rules_of_others_that_lead_into_our_chains_are_named_and_removed(backend: IptablesBackend, name: str) -> None:
    plan = PLANS["default"]
    backend.apply(plan)
    add_strays(name)

    found = {difference.where for difference in compare(backend.expected(plan), backend.observe())}
    assert backend.apply(plan)

    assert found == {"v4 nat/OUTPUT", "v6 nat/FOREIGN2"}
    assert len(backend.strays) == 3
    assert compare(backend.expected(plan), backend.observe()) == ()
    assert not backend.apply(plan)


def test_remove_takes_along_what_leads_into_our_chains(backend: IptablesBackend, name: str) -> None:
    run(f"{tool_of(name)} -t nat -A OUTPUT -p udp -j ACCEPT")
    backend.apply(PLANS["default"])
    add_strays(name)

    assert backend.remove()

    assert len(backend.strays) == 3
    assert "INTERCEPT" not in run(f"{tool_of(name)}-save") + run(f"{tool_of(name, 'ip6tables')}-save")
    assert "-A OUTPUT -p udp -j ACCEPT" in run(f"{tool_of(name)}-save -t nat")


@pytest.mark.parametrize("transactions", [0, 1, 2])
def test_strays_do_not_keep_a_failed_apply_from_being_undone(name: str, transactions: int) -> None:
    BACKENDS[name]().apply(PLANS["tproxy"])
    run(f"{tool_of(name)} -t mangle -A OUTPUT -p udp -j INTERCEPT_MARK")
    tool = Failing(TOOLS[name], Family.V6, transactions, BackendError("refused by the test"))
    with pytest.raises(BackendError, match="refused by the test"):
        IptablesBackend("legacy", tool).apply(PLANS["log"])
    left = compare(BACKENDS[name]().expected(PLANS["tproxy"]), BACKENDS[name]().observe())
    # It went with IPv4's transaction, and is of no use to anybody.
    assert [str(difference) for difference in left] == []
