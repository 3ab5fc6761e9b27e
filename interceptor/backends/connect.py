"""`--outbound connect` in the kernel: put a plan's policy there, take it away, compare. connect_pins.py holds the handles.

One swap of one map entry decides what is captured, IPv4 and IPv6 together: before it, new programs and lists change
nothing; after it, the old ones are no longer looked at.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace

from interceptor import netns
from interceptor.backends import cgroups, connect_pins
from interceptor.backends.base import Difference, compare_chain
from interceptor.backends.connect_pins import Held, Pins
from interceptor.bpf import special
from interceptor.bpf.cookie import netns_cookie
from interceptor.bpf.maps import Map, create_map
from interceptor.bpf.syscall import BpfError
from interceptor.errors import BackendError, ConfigError, InterceptorError, Problem, Unsupported
from interceptor.plan.model import ConnectCapture
from interceptor.render.connect_bytes import Placed, pack, pack_lists, placed_of, unpack
from interceptor.render.connect_policy import Policy, compile_policy, texts

NS_GET_USERNS = 0xB701  # linux/nsfs.h: _IO(0xb7, 0x1)
INITIAL_USERNS = 0xEFFFFFFD  # linux/proc_ns.h: PROC_USER_INIT_INO
WHERE = "connect"


@dataclass(frozen=True, slots=True)
class Switched:
    """What switch_on() did. `undo` brings back what was captured before, `finish` lets go of it."""

    changed: bool
    undo: Callable[[], None]
    finish: Callable[[], None]


def _nothing() -> None:
    pass


NOT_SWITCHED = Switched(changed=False, undo=_nothing, finish=_nothing)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the kernel should hold."""

    policy: Policy
    lists: dict[bytes, bytes]
    cgroup: str  # directory
    cgroup_id: int
    proxy_cgroup_id: int

    def pack(self, cookie: int, sets: int) -> bytes:
        return pack(self.policy, Placed(cookie, sets, self.proxy_cgroup_id))

    def is_held(self, held: Held | None, cookie: int) -> bool:
        return held is not None and held.lists == self.lists and held.policy == self.pack(cookie, placed_of(held.policy).sets)

    @property
    def read_back(self) -> Policy:
        """The policy as it is read from the kernel: cgroups are numbers there."""
        return replace(self.policy, cgroup=str(self.proxy_cgroup_id)) if self.policy.cgroup else self.policy


def require() -> None:
    """Raises Unsupported where this host can capture nothing at connect(), by what it has and what is mounted."""
    connect_pins.require_bpffs()
    cgroups.mount_point()
    _cookie()


def switch_on(capture: ConnectCapture) -> Switched:
    """Capture as `capture` says, from one moment to the next, and nothing else of ours by this mechanism.

    Read back before it returns. Raises ConfigError without a cgroup, Unsupported, BackendError; then nothing has changed.
    """
    wanted = _wanted(capture)
    _refuse_foreign_users()
    cookie = _cookie()
    try:
        return _switch_on(wanted, Pins(cookie))
    except (BpfError, OSError) as error:
        raise BackendError(f"--outbound connect: {error}. It needs CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN") from error


def switch_off() -> bool:
    """Capture nothing by this mechanism; whether there was anything of ours. Raises BackendError."""
    try:
        pins = Pins(netns_cookie())
        if not pins.exist:
            return False
        pins.remove()
    except (BpfError, OSError) as error:
        raise BackendError(f"removing what captures at connect(): {error}") from error
    return True


def differences(capture: ConnectCapture | None) -> Iterator[Difference]:
    """How the kernel differs from `capture`. Changes nothing."""
    try:
        pins = Pins(netns_cookie())
        if capture is not None:
            yield from _differences(_wanted(capture), pins)
        elif pins.exist:
            yield Difference("extra", WHERE, f"{pins.directory}, of --outbound connect")
    except (BpfError, OSError) as error:
        raise BackendError(f"reading what captures at connect(): {error}") from error


def is_there() -> bool:
    """Whether anything of ours captures here by this mechanism."""
    return Pins(netns_cookie()).held() is not None


def _cookie() -> int:
    try:
        return netns_cookie()
    except BpfError as error:
        raise Unsupported(str(error)) from error


def _wanted(capture: ConnectCapture) -> _Wanted:
    if capture.cgroup is None:
        expected = "the cgroup v2 path whose processes are to be captured (/ for all), unless --netns is the pid of one of them"
        raise ConfigError([Problem("--capture-cgroup", "", expected)])
    policy, _ = compile_policy(capture)
    cgroup = cgroups.directory(capture.cgroup, "--capture-cgroup")
    proxy = cgroups.identity(cgroups.directory(policy.cgroup, "--proxy-cgroup")) if policy.cgroup is not None else 0
    return _Wanted(policy, pack_lists(policy), cgroup, cgroups.identity(cgroup), proxy)


def _refuse_foreign_users() -> None:
    """User and group ids are the host's to BPF: those of a namespace with users of its own would be others."""
    namespace = os.open(netns.CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # not ours to see: certainly not the initial one
            owner = fcntl.ioctl(namespace, NS_GET_USERNS)
            is_initial = os.fstat(owner).st_ino == INITIAL_USERNS
            os.close(owner)
            if is_initial:
                return
    finally:
        os.close(namespace)
    raise Unsupported("--outbound connect: this network namespace belongs to a user namespace; --outbound redirect works there")


def _is_current(wanted: _Wanted, pins: Pins) -> bool:
    attached = pins.cgroup_ids()
    return (
        pins.version() == connect_pins.current_version()
        and attached == dict.fromkeys(connect_pins.PROGRAMS, wanted.cgroup_id)
        and wanted.is_held(pins.held(), pins.cookie)
    )


def _switch_on(wanted: _Wanted, pins: Pins) -> Switched:
    if pins.exist and _is_current(wanted, pins):
        return NOT_SWITCHED
    for stale in connect_pins.abandoned():
        if stale.cookie != pins.cookie:
            stale.remove()
    with ExitStack() as opened:
        was_on = pins.held() is not None
        old_cgroup_id = pins.cgroup_ids().get(connect_pins.PROGRAMS[0])
        try:
            maps = pins.maps()
            for each in maps.values():
                opened.callback(each.close)
            before = special.inner_of(maps["active"], 0)
            if before is not None:
                opened.callback(before.close)
            pins.attach(maps, wanted.cgroup, wanted.cgroup_id)
            _swap(wanted, pins, maps, before)
        except (InterceptorError, OSError):
            _detach_new(pins, old_cgroup_id if was_on else None)
            raise
        opened.pop_all()
    return Switched(
        changed=True,
        undo=lambda: _undo(pins, maps, before, old_cgroup_id),
        finish=lambda: _finish(pins, maps, before, wanted),
    )


def _swap(wanted: _Wanted, pins: Pins, maps: dict[str, Map], before: Map | None) -> None:
    """Fill maps that nobody looks at yet, read them back, and make them the ones in use."""
    sets = 1 - _sets(before) if before is not None else 0
    with closing(create_map(connect_pins.LISTS)) as lists, closing(create_map(connect_pins.POLICY)) as policy:
        for key, value in wanted.lists.items():
            lists.update(key, value)
        policy.update(connect_pins.FIRST, wanted.pack(pins.cookie, sets))
        found = Held(policy.lookup(connect_pins.FIRST) or b"", dict(lists.items()))
        if not wanted.is_held(found, pins.cookie):
            raise BackendError("--outbound connect: the kernel does not hold what was written to its maps. Nothing was changed")
        special.set_inner(maps["all_sets"], sets, lists)
        special.set_inner(maps["active"], 0, policy)


def _undo(pins: Pins, maps: dict[str, Map], before: Map | None, old_cgroup_id: int | None) -> None:
    try:
        if before is not None:
            special.set_inner(maps["active"], 0, before)
        _detach_new(pins, old_cgroup_id if before is not None else None)
    finally:
        _close(maps, before)


def _detach_new(pins: Pins, old_cgroup_id: int | None) -> None:
    """Leave what was captured before with the cgroup that it was for; None: nothing was."""
    if old_cgroup_id is not None:
        pins.settle(old_cgroup_id)
    else:
        pins.remove()


def _finish(pins: Pins, maps: dict[str, Map], before: Map | None, wanted: _Wanted) -> None:
    try:
        if before is not None:
            maps["all_sets"].delete(_sets(before).to_bytes(4, "little"))
        pins.settle(wanted.cgroup_id)
    finally:
        _close(maps, before)


def _close(maps: dict[str, Map], before: Map | None) -> None:
    for each in (*maps.values(), *((before,) if before else ())):
        each.close()


def _sets(policy: Map) -> int:
    return placed_of(policy.lookup(connect_pins.FIRST) or b"").sets


def _differences(wanted: _Wanted, pins: Pins) -> Iterator[Difference]:
    held = pins.held() if pins.exist else None
    if held is None:
        yield Difference("missing", WHERE, "the whole policy")
        return
    expected, found = texts(wanted.read_back), texts(unpack(held.policy, held.lists))
    yield from compare_chain(WHERE, expected, found)
    if expected == found and not wanted.is_held(held, pins.cookie):
        yield Difference("changed", WHERE, "the maps' bytes, though they read the same")
    attached = pins.cgroup_ids()
    for name in connect_pins.PROGRAMS:
        where = f"{WHERE} program {name}"
        if name not in attached:
            yield Difference("missing", where, f"its link to cgroup {wanted.cgroup}")
        elif attached[name] != wanted.cgroup_id:
            yield Difference("changed", where, f"it is attached to another cgroup (should be: {wanted.cgroup})")
    for name in attached.keys() - set(connect_pins.PROGRAMS):
        yield Difference("extra", f"{WHERE} program {name}", "a link that an interrupted run left")
    if pins.version() != connect_pins.current_version():
        yield Difference("changed", f"{WHERE} programs", "they are from another version of interceptor")
