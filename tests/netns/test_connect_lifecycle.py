"""Capture at connect(): enable, again, otherwise, under traffic, killed half-way; disable. What changes and what must not."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from interceptor import capture
from interceptor.backends import connect as backend
from interceptor.backends import netlink, process
from interceptor.backends.connect_pins import Held, Pins
from interceptor.bpf import links, places, special
from interceptor.bpf.cookie import netns_cookie
from interceptor.bpf.maps import HASH, MapDefinition, create_map
from interceptor.bpf.syscall import object_info
from interceptor.errors import BackendError, ConfigError, InterceptorError, Unsupported
from interceptor.netns import entered, identity
from tests.netns.test_contract_lifecycle import CAPTURED, answers, open_connections, questions, traffic
from tests.rig.capturing import capturing, enable, options
from tests.rig.client import Answer, ask, ask_all, wait_until
from tests.rig.connecting import attached, own_bpffs, own_cgroup
from tests.rig.crashing import crashes
from tests.rig.kernel import snapshot
from tests.rig.refusing import descriptors, each_refused
from tests.rig.world import NETS, SECOND_OUTBOUND, World

MOST_STEPS = 200


@dataclass(frozen=True, slots=True)
class Place:
    """The world, whose pod is captured, and the cgroup of this process: two levels deep."""

    w: World
    cgroup: str
    bpffs: str

    def texts(self, **more: str) -> dict[str, str]:
        """Options of --outbound connect."""
        return {"backend": "nft", "outbound": "connect", "capture_cgroup": self.cgroup, **more}

    def pins(self) -> Pins:
        with entered(self.w.pod.path):
            return Pins(netns_cookie())

    def programs(self) -> int:
        """How many programs run for this process's cgroup and the one above."""
        return attached(self.cgroup) + attached(self.cgroup.rpartition("/")[0])

    def holds(self, texts: dict[str, str]) -> bool:
        """Whether the active policy is that of these options."""
        plan = capture.prepare(options(**texts), netns=self.w.pod.name).plan
        assert plan.connect is not None
        pins = self.pins()
        return backend._wanted(plan.connect).is_held(pins.held(), pins.cookie)


@pytest.fixture(scope="module")
def place(w: World) -> Iterator[Place]:
    with own_bpffs() as bpffs, own_cgroup("pod") as cgroup:
        yield Place(w, cgroup, bpffs)


@pytest.fixture(autouse=True)
def _leaves_nothing(place: Place) -> Iterator[None]:
    before = snapshot(place.w.pod), sorted(os.listdir(place.bpffs))
    assert place.programs() == 0
    yield
    capture.disable(netns=place.w.pod.name)
    assert place.programs() == 0
    assert (snapshot(place.w.pod), sorted(os.listdir(place.bpffs))) == before


def test_disable_leaves_nothing(place: Place) -> None:
    with capturing(place.w.pod, **place.texts()):
        assert place.programs() == 5
        assert place.pins().exist
    assert not place.pins().exist
    assert place.programs() == 0
    assert not capture.disable(netns=place.w.pod.name).changed


def test_enable_again_touches_nothing(place: Place) -> None:
    texts = place.texts(exclude_outbound_cidrs="10.0.0.0/8", exclude_uids="5-9")
    with capturing(place.w.pod, **texts) as report:
        assert report.changed
        before = ids(place)
        assert not enable(place.w.pod, **texts).changed
        assert ids(place) == before
        assert capture.check(options(**texts), netns=place.w.pod.name).differences == ()


def ids(place: Place) -> dict[str, bytes]:
    """What the kernel says of each pin, its number included."""
    found: dict[str, bytes] = {}
    directory = place.pins().directory
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if os.path.islink(path):
            found[name] = os.readlink(path).encode()
            continue
        link = links.open_pinned_link(path)
        found[name] = object_info(link.descriptor)
        link.close()
    for name in ("active", "all_sets"):
        outer = links.open_pinned_map(os.path.join(directory, name))
        found[f"in {name}"] = b"".join(outer.lookup(number.to_bytes(4, "little")) or b"-" for number in (0, 1))
        inner = special.inner_of(outer, 0)
        if inner is not None:
            inner.close()
        outer.close()
    return found


def test_check_names_what_differs(place: Place) -> None:
    texts = place.texts()
    with capturing(place.w.pod, **place.texts(exclude_uids="5-9")):
        kinds = [(item.kind, item.rule) for item in capture.check(options(**texts), netns=place.w.pod.name).differences]
        assert any("uid 5-9 -> direct" in rule for _, rule in kinds)
    (difference, *_) = (
        item for item in capture.check(options(**texts), netns=place.w.pod.name).differences if item.where == "connect"
    )
    assert (difference.kind, difference.rule) == ("missing", "the whole policy")
    with capturing(place.w.pod, **texts):
        os.unlink(os.path.join(place.pins().directory, "connect6"))
        found = capture.check(options(**texts), netns=place.w.pod.name).differences
        assert [item.where for item in found] == ["connect program connect6"]
        assert enable(place.w.pod, **texts).changed
        assert capture.check(options(**texts), netns=place.w.pod.name).differences == ()
    with capturing(place.w.pod, **texts):
        found = capture.check(options(backend="nft", outbound="off"), netns=place.w.pod.name).differences
        assert ("extra", "connect") in [(item.kind, item.where) for item in found]


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([{"dns": "all", "exclude_outbound_ports": "1-70,9999"}, {"exclude_uids": "5-9"}], id="lists"),
        pytest.param([{"outbound_port": str(SECOND_OUTBOUND)}], id="another-port"),
        pytest.param([{"capture_cgroup": ""}, {"capture_cgroup": "/"}], id="another-cgroup"),
    ],
)
def test_reconfiguring_under_traffic_loses_and_leaks_nothing(others: list[dict[str, str]], place: Place) -> None:
    above = place.cgroup.rpartition("/")[0]
    with capturing(place.w.pod, **place.texts()), open_connections(questions(place.w), CAPTURED):
        with traffic(questions(place.w)) as ended:
            for more in (*others, {}):
                texts = place.texts(**{name: text or above for name, text in more.items()})
                assert enable(place.w.pod, **texts).changed
                assert capture.check(options(**texts), netns=place.w.pod.name).differences == ()
        assert set(ended) == CAPTURED


@pytest.mark.parametrize("inbound", ["redirect", "tproxy"])
@pytest.mark.parametrize("other", ["redirect", "tproxy", "off"])
def test_changing_the_mechanism_under_traffic_loses_and_leaks_nothing(other: str, inbound: str, place: Place) -> None:
    by_rules = {"backend": "nft", "outbound": other, "inbound": inbound}
    connecting = place.texts(inbound=inbound)
    for first, second in ((by_rules, connecting), (connecting, by_rules)):
        before, after = answers(outbound=first["outbound"]), answers(outbound=second["outbound"])
        with capturing(place.w.pod, **first), open_connections(questions(place.w), before):
            with traffic(questions(place.w)) as ended:
                assert enable(place.w.pod, **second).changed
            assert set(ended) == before | after
            assert place.programs() == (5 if second is connecting else 0)


@pytest.mark.parametrize("first", [{}, {"outbound": "redirect", "capture_cgroup": ""}], ids=["connect", "redirect"])
def test_refused_rules_undo_the_policy(first: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    above = place.cgroup.rpartition("/")[0]
    old, new = place.texts(**first), place.texts(exclude_uids="5-9", inbound="tproxy", capture_cgroup=above)
    with capturing(place.w.pod, **old):
        with monkeypatch.context() as patched:
            patched.setattr(netlink, "transaction", refuse_bytes)
            patched.setattr(process, "run_checked", refuse)
            with pytest.raises(BackendError, match="no rules today"):
                enable(place.w.pod, **new)
        assert capture.check(options(**old), netns=place.w.pod.name).differences == ()
        for question in questions(place.w):
            assert ask_all([question])[0] in CAPTURED


def refuse_bytes(*_arguments: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no bytes today")


def refuse(*_arguments: object, **_named: object) -> str:
    raise BackendError("no rules today")


def test_cgroup_that_is_not_there_changes_nothing(place: Place) -> None:
    with capturing(place.w.pod, **place.texts()):
        before = ids(place)
        with pytest.raises(ConfigError, match="--capture-cgroup: 'no/such'"):
            enable(place.w.pod, **place.texts(capture_cgroup="no/such"))
        with pytest.raises(ConfigError, match="--capture-cgroup"):
            enable(place.w.pod, **place.texts(capture_cgroup=""))
        assert ids(place) == before


def test_a_pid_says_which_cgroup(place: Place) -> None:
    with subprocess.Popen(["ip", "netns", "exec", place.w.pod.name, "sleep", "60"]) as process:
        try:
            wait_until(lambda: identity(f"/proc/{process.pid}/ns/net") == identity(place.w.pod.path), "it is in the pod")
            report = capture.enable(options(backend="nft", outbound="connect"), netns=str(process.pid))
            assert report.plan.connect is not None
            assert report.plan.connect.cgroup == place.cgroup
            assert set(ask_all(questions(place.w))) == CAPTURED
        finally:
            process.kill()


def test_a_namespace_with_users_of_its_own_is_refused(place: Place) -> None:
    with subprocess.Popen(["unshare", "--user", "--map-root-user", "--net", "sleep", "60"]) as process:
        try:
            wait_until(lambda: identity(f"/proc/{process.pid}/ns/net") != identity(), "it is in a namespace of its own")
            with pytest.raises(Unsupported, match="user namespace"):
                capture.enable(options(backend="nft", outbound="connect"), netns=str(process.pid))
        finally:
            process.kill()


def test_without_a_bpffs_nothing_changes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with capturing(place.w.pod, backend="nft"):
        before = snapshot(place.w.pod)
        with monkeypatch.context() as patched:
            patched.setattr(places, "BPFFS", "/tmp")
            with pytest.raises(Unsupported, match="is no bpffs; mount -t bpf"):
                enable(place.w.pod, **place.texts())
        assert snapshot(place.w.pod) == before


def test_pins_with_another_layout_are_left_alone(place: Place) -> None:
    with capturing(place.w.pod, **place.texts()):
        path = os.path.join(place.pins().directory, "originals")
        os.unlink(path)
        other = create_map(MapDefinition("originals", HASH, 4, 4, 1))
        links.pin(other.descriptor, path)
        other.close()
        os.unlink(os.path.join(place.pins().directory, "object"))
        with pytest.raises(BackendError, match="interceptor clean"):
            enable(place.w.pod, **place.texts(exclude_uids="5"))
        assert place.holds(place.texts())


def test_options_that_need_packets_are_refused() -> None:
    for name, text in (("exclude_interfaces", "eth1"), ("virtual_interfaces", "virt0"), ("log_rules", "true")):
        with pytest.raises(ConfigError, match=name.replace("_", "-")):
            options(outbound="connect", **{name: text})


def test_too_many_rules_are_refused_before_anything_changes(place: Place) -> None:
    many = ";".join(f"tcp:{port}:{port}" for port in range(1, 200))
    with pytest.raises(InterceptorError, match="rules with .* different lists"):
        enable(place.w.pod, **place.texts(exclude_outbound_for_uids=many))
    assert not place.pins().exist


def test_pins_of_a_cgroup_that_is_gone_are_swept_away(place: Place) -> None:
    from interceptor.backends import cgroups

    gone = os.path.join(cgroups.mount_point(), f"{place.cgroup.partition('/')[0]}", "gone")
    os.mkdir(gone)
    with capturing(place.w.guest, **place.texts(capture_cgroup=f"{place.cgroup.partition('/')[0]}/gone")):
        with entered(place.w.guest.path):
            pins = Pins(netns_cookie())
        os.rmdir(gone)
        wait_until(lambda: not any(pins.cgroup_ids().values()), "the kernel lets go of the cgroup")
        with capturing(place.w.pod, **place.texts()):
            assert os.listdir(places.root()) == [f"connect-{place.pins().cookie}"]
    assert not os.path.isdir(places.root())


# --- kill -9 at every change --------------------------------------------------------------------------------------------

OLD = {"exclude_outbound_ports": "1-70,9999"}
NEW = {"exclude_uids": "5-9", "inbound": "tproxy"}


def held(place: Place) -> Held | None:
    pins = place.pins()
    return pins.held() if pins.exist else None


def test_killed_while_it_reconfigures(place: Place) -> None:
    old, new = place.texts(**OLD), place.texts(**NEW, capture_cgroup=place.cgroup.rpartition("/")[0])
    with capturing(place.w.pod, **old):
        for step in crashes(place.w.pod.name, "enable", new, MOST_STEPS):
            assert set(ask_all(questions(place.w))) == CAPTURED, f"step {step}"
            assert place.holds(old) or place.holds(new), f"step {step}"
            mended = new if step % 2 else old
            enable(place.w.pod, **mended)
            assert capture.check(options(**mended), netns=place.w.pod.name).differences == ()
            enable(place.w.pod, **old)


def test_killed_while_it_enables_the_first_time(place: Place) -> None:
    before = snapshot(place.w.pod)
    for step in crashes(place.w.pod.name, "enable", place.texts(**NEW), MOST_STEPS):
        assert held(place) is None or place.holds(place.texts(**NEW)), f"step {step}"
        by = {ask(place.w.pod, net.at("server")).by for net in NETS.values()}
        assert len(by) == 1, f"step {step}: one family alone is captured"
        capture.disable(netns=place.w.pod.name)
        assert snapshot(place.w.pod) == before
        assert (place.programs(), os.path.exists(places.root())) == (0, False)


def test_killed_while_it_disables(place: Place) -> None:
    texts = place.texts()
    enable(place.w.pod, **texts)
    for step in crashes(place.w.pod.name, "disable", {}, MOST_STEPS):
        assert {ask(place.w.pod, net.at("server")).by for net in NETS.values()} in ({"outbound"}, {"far"}), f"step {step}"
        if step % 2:
            capture.disable(netns=place.w.pod.name)
            assert place.programs() == 0
        enable(place.w.pod, **texts)
        assert capture.check(options(**texts), netns=place.w.pod.name).differences == ()


def test_refused_anything_the_first_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = place.texts(**NEW)
    before = (snapshot(place.w.pod), place.programs(), os.path.exists(places.root()))
    capturing_nothing = descriptors()
    for number, why in each_refused(lambda: enable(place.w.pod, **texts), monkeypatch):
        if not why or capture.STANDS in why:
            assert place.holds(texts), f"call {number}: {why}"
            capture.disable(netns=place.w.pod.name)
        wait_until(lambda: place.programs() == 0, f"nothing attached after call {number}: {why}")  # soon after a close
        assert (snapshot(place.w.pod), place.programs(), os.path.exists(places.root())) == before, f"call {number}: {why}"
        assert descriptors() == capturing_nothing, f"call {number}: {why}"


@pytest.mark.torture
def test_refused_anything_while_it_reconfigures(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = place.texts(**OLD), place.texts(**NEW, capture_cgroup=place.cgroup.rpartition("/")[0])
    with capturing(place.w.pod, **old):
        before = (snapshot(place.w.pod), place.programs())
        capturing_old = descriptors()
        for number, why in each_refused(lambda: enable(place.w.pod, **new), monkeypatch):
            if not why or capture.STANDS in why:
                assert place.holds(new), f"call {number}: {why}"
                capture.disable(netns=place.w.pod.name)
                enable(place.w.pod, **old)
            wait_until(lambda: place.programs() == before[1], f"as before call {number}: {why}")
            assert snapshot(place.w.pod) == before[0], f"call {number}: {why}"
            assert capture.check(options(**old), netns=place.w.pod.name).differences == (), f"call {number}: {why}"
            assert descriptors() == capturing_old, f"call {number}: {why}"


@pytest.mark.torture
def test_refused_anything_while_it_disables(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = place.texts(**NEW)
    enable(place.w.pod, **texts)
    before = descriptors()
    for number, why in each_refused(lambda: capture.disable(netns=place.w.pod.name), monkeypatch):
        if not why:
            assert (place.programs(), place.pins().exist) == (0, False), f"call {number}"
        capture.disable(netns=place.w.pod.name)
        assert (place.programs(), os.path.exists(places.root())) == (0, False), f"call {number}: {why}"
        enable(place.w.pod, **texts)
        assert descriptors() == before, f"call {number}: {why}"


def test_killed_while_it_changes_from_rules(place: Place) -> None:
    old, new = {"backend": "nft"}, place.texts()
    with capturing(place.w.pod, **old):
        for step in crashes(place.w.pod.name, "enable", new, MOST_STEPS):
            assert set(ask_all(questions(place.w))) == CAPTURED, f"step {step}"
            enable(place.w.pod, **(new if step % 2 else old))
            enable(place.w.pod, **old)
            assert place.programs() == 0
    assert ask(place.w.pod, NETS["v4"].at("server")) == Answer("far", NETS["v4"].at("server"))
