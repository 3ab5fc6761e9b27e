"""walk() and the kernel say the same with capture at connect(): sampled configurations, sampled connections and datagrams."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from interceptor import capture
from interceptor.config import Config
from interceptor.errors import ConfigError
from tests.netns import test_walk_agrees as by_rules
from tests.rig.capturing import options
from tests.rig.connecting import own_bpffs, own_cgroup
from tests.rig.kernel import forget_connections
from tests.rig.net import resolv_conf
from tests.rig.world import NETS, World

SHORT, LONG = 20, 150
# Options that --outbound connect refuses.
NEED_PACKETS = ("exclude_interfaces", "virtual_interfaces", "log_rules")


@pytest.fixture(scope="module")
def walked(w: World) -> Iterator[World]:
    """The network, with resolvers, and this process in a cgroup that the configurations name."""
    with own_bpffs(), own_cgroup("pod"), resolv_conf(w.pod, *(net.resolver for net in NETS.values())):
        try:
            yield w
        finally:
            capture.disable(netns=w.pod.name)


def test_short(walked: World) -> None:
    assert_agreement(walked, random.Random("short connect"), SHORT)


@pytest.mark.torture
def test_long(walked: World) -> None:
    assert_agreement(walked, random.Random("long connect"), LONG)


def assert_agreement(w: World, chance: random.Random, count: int) -> None:
    """`count` random configurations, each with as many packets as those by rules."""
    for _ in range(count):
        texts, config = draw_config(chance)
        plan = capture.enable(config, netns=w.pod.name).plan
        differences = capture.check(config, netns=w.pod.name).differences
        assert [item for item in differences if item.where.startswith("connect")] == []
        pairs = [by_rules.draw_packet(w, plan, chance) for _ in range(by_rules.PAIRS_PER_CONFIG)]
        expected = [by_rules.expected_answer(by_rules.walk(plan, packet), packet) for _, packet in pairs]
        found = by_rules.ask_as_expected([question for question, _ in pairs], expected)
        wrong = [
            f"{packet}: kernel {kernel}, walk {wanted}"
            for (_, packet), kernel, wanted in zip(pairs, found, expected, strict=True)
            if kernel != wanted
        ]
        assert wrong == [], f"{len(wrong)} of {len(pairs)} under {texts}"
        forget_connections(w.pod)


def draw_config(chance: random.Random) -> tuple[dict[str, str], Config]:
    """A valid configuration, as texts and parsed."""
    seldom = {name: choices for name, choices in by_rules.SELDOM.items() if name not in NEED_PACKETS}
    while True:
        texts = {name: chance.choice(choices) for name, choices in by_rules.CHOSEN.items()}
        texts |= {name: chance.choice(choices) for name, choices in seldom.items() if chance.random() < 0.2}
        texts |= {"backend": "nft", "outbound": "connect", "capture_cgroup": own_path(chance)}
        try:
            return texts, options(**texts)
        except ConfigError:
            continue


def own_path(chance: random.Random) -> str:
    """The cgroup of this process, one above it, or that of every process."""
    with open("/proc/self/cgroup", encoding="ascii") as file:
        own = next(line[3:].strip().strip("/") for line in file if line.startswith("0::"))
    return chance.choice((own, own.rpartition("/")[0], "/"))
