"""What processes and the machine used: CPU, context switches, memory, read from /proc. Knows no proxy.

CPU of a process comes from schedstat (nanoseconds); it includes softirq work done in its context. CPU of the machine comes from
/proc/stat in ticks. Foreign CPU is what user processes used that are neither ours nor our children.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
START_DEADLINE_S = 3.0
LOOK_S = 0.1
RESTING_SHARE = 0.02  # of a core
KTHREADD = 2  # parent of all kernel threads


@dataclass(frozen=True, slots=True)
class Used:
    """Totals at one moment; the difference of two is what a run used. Seconds, and counts."""

    at_s: float
    proxy_s: float
    machine_s: float
    foreign_s: float
    switches: int

    def __sub__(self, before: Used) -> Used:
        return Used(
            self.at_s - before.at_s,
            self.proxy_s - before.proxy_s,
            self.machine_s - before.machine_s,
            self.foreign_s - before.foreign_s,
            self.switches - before.switches,
        )

    @property
    def foreign_cores(self) -> float:
        """How many cores others used, on average."""
        return max(0.0, self.foreign_s) / self.at_s if self.at_s else 0.0


def used(pids: Iterable[int]) -> Used:
    """What the processes `pids` and the machine have used so far."""
    every = list(pids)
    return Used(time.monotonic(), cpu_s(every), machine_s(), foreign_s(), switches(every))


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds of all threads alive of these processes."""
    total_ns = 0
    for path in _task_files(pids, "schedstat"):
        total_ns += int((_read(path) or "0").split()[0])
    return total_ns / 1e9


def switches(pids: Iterable[int]) -> int:
    """Context switches, voluntary and not, of all threads alive of these processes."""
    total = 0
    for path in _task_files(pids, "status"):
        total += sum(int(line.split()[1]) for line in _read(path).splitlines() if "ctxt_switches" in line)
    return total


def is_traced(pid: int) -> bool:
    """Whether a debugger or strace is attached to every thread of the process."""
    return all("TracerPid:\t0\n" not in _read(path) for path in _task_files([pid], "status"))


def pss_kb(pids: Iterable[int]) -> int:
    """Proportional set size in KB: memory of these processes, shared pages divided among those who share them."""
    total = 0
    for pid in pids:
        total += next(
            int(line.split()[1]) for line in _read(f"/proc/{pid}/smaps_rollup").splitlines() if line.startswith("Pss:")
        )
    return total


def slab_kb() -> int:
    """The kernel's slab memory in KB, machine-wide: where sockets and conntrack entries live."""
    return next(int(line.split()[1]) for line in _read("/proc/meminfo").splitlines() if line.startswith("Slab:"))


def machine_s() -> float:
    """CPU seconds of the whole machine that were neither idle nor waiting for a disk (proc(5), /proc/stat)."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, _read("/proc/stat").split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) * TICK_S


def foreign_s() -> float:
    """CPU seconds of user processes that are not this one or its descendants, their reaped children included."""
    table = dict(_processes())
    ours = family(os.getpid(), {pid: row.parent for pid, row in table.items()})
    ticks = sum(row.ticks for pid, row in table.items() if pid not in ours and KTHREADD not in (pid, row.parent))
    return ticks * TICK_S


def tree(root: int) -> list[int]:
    """`root` and its descendants."""
    return sorted(family(root, {pid: row.parent for pid, row in _processes()}))


def family(root: int, parents: dict[int, int]) -> set[int]:
    """`root` and everyone below it, by a table of parents."""
    found = {root}
    grew = True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        grew = bool(more)
        found |= more
    return found


def await_idle(root: int) -> None:
    """Until the processes under `root` are all there and have stopped working: what they do to start is not to be measured.

    One that never rests (timers) is measured with its unrest, after START_DEADLINE_S.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    before: tuple[list[int], float] = ([], 0.0)
    while time.monotonic() < deadline:
        pids = tree(root)
        now = pids, cpu_s(pids)
        if now[0] == before[0] and now[1] - before[1] < RESTING_SHARE * LOOK_S:
            return
        before = now
        time.sleep(LOOK_S)


@dataclass(frozen=True, slots=True)
class _Row:
    parent: int
    ticks: int


def _processes() -> Iterator[tuple[int, _Row]]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (text := _read(f"/proc/{name}/stat")):
            yield int(name), parse_stat(text)


def parse_stat(text: str) -> _Row:
    """Parent and CPU ticks (own and reaped children's) of a /proc/PID/stat line. The name may hold spaces and parentheses."""
    fields = text.rpartition(")")[2].split()
    return _Row(parent=int(fields[1]), ticks=sum(map(int, fields[11:15])))


def _task_files(pids: Iterable[int], name: str) -> Iterator[str]:
    for pid in pids:
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
        except FileNotFoundError:
            continue  # ended since it was listed
        for task in tasks:
            yield f"/proc/{pid}/task/{task}/{name}"


def _read(path: str) -> str:
    # A process may end between the listing and the look.
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""
