"""From one set of our rules to another as iptables-restore text, such that nothing that was captured leaks meanwhile. No I/O.

iptables' transactions are one table and one family each. Where capture moves between mangle and nat there would be a moment
without any, so a guard in raw drops new connections until all tables stand. After a crash it is the guard that is left: closed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from interceptor.plan.model import Hook
from interceptor.render.iptables import TABLES, restore_table
from interceptor.render.iptables_save import TableRules
from interceptor.render.iptables_text import normalised
from interceptor.render.names import IPTABLES_PREFIX
from interceptor.values import Family

GUARD = IPTABLES_PREFIX + "GUARD"
CAPTURING = ("mangle", "nat")
_GUARDED = (Hook.PREROUTING.value, Hook.OUTPUT.value)  # the built-in chains of raw
_LOOPBACK = {Family.V4: "127.0.0.0/8", Family.V6: "::1/128"}
_WHY = '-m comment --comment "capture is being switched"'


def switch(
    wanted: Mapping[str, TableRules], present: Mapping[str, TableRules], family: Family, anew: Collection[str] = ()
) -> str:
    """Restore text that turns `present` into `wanted`, both of `family`. Tables that are right stay as they are, but `anew`."""
    changed = tuple(name for name in TABLES if name in anew or not same(wanted.get(name), present.get(name)))
    if not _needs_guard(wanted, present, changed):
        return "".join(restore_table(name, wanted.get(name), present.get(name)) for name in changed)
    guarded = _guarded(wanted.get("raw"), present, family)
    return "".join(
        (
            restore_table("raw", guarded, present.get("raw")),
            *(restore_table(name, wanted.get(name), present.get(name)) for name in CAPTURING if name in changed),
            restore_table("raw", wanted.get("raw"), guarded),
        )
    )


def same(one: TableRules | None, other: TableRules | None) -> bool:
    """Whether the two hold the same, however their rules are written."""
    return _normal_form(one) == _normal_form(other)


def _normal_form(table: TableRules | None) -> tuple[object, ...]:
    table = table or TableRules()
    chains = {chain: [normalised(rule) for rule in rules] for chain, rules in table.chains.items()}
    jumps = {hook: targets for hook, targets in table.jumps.items() if targets}
    return chains, jumps, {hook: others for hook, others in table.behind.items() if hook in jumps}, table.strays


def _needs_guard(wanted: Mapping[str, TableRules], present: Mapping[str, TableRules], changed: tuple[str, ...]) -> bool:
    if not wanted:
        return False
    left_by_a_crash = GUARD in present.get("raw", TableRules()).chains
    had_capture = any(name in present for name in CAPTURING)
    return left_by_a_crash or (had_capture and all(name in changed for name in CAPTURING))


def _guarded(raw: TableRules | None, present: Mapping[str, TableRules], family: Family) -> TableRules:
    """`raw` with the guard in front: new connections wait for their next SYN rather than leave uncaptured."""
    raw = raw or TableRules()
    captured = [rule for name in CAPTURING for rules in present.get(name, TableRules()).chains.values() for rule in rules]
    # By address and not by `-o lo`: a pod's connection to its own address goes over lo, too, and may be captured.
    specs = [f"-d {_LOOPBACK[family]} -j RETURN", "-i lo -j RETURN"]
    specs.append(f"-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN {_WHY} -j DROP")
    if any("-p udp" in rule for rule in captured):
        specs.append(f"-p udp {_WHY} -j DROP")
    hooks = {hook: [GUARD, *raw.jumps.get(hook, [])] for hook in _GUARDED}
    return TableRules({GUARD: specs, **raw.chains}, {**raw.jumps, **hooks})
