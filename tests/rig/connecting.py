"""What capture at connect() needs: a cgroup that the test's own process is in, and a bpffs. And what it left, read by hand."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from interceptor.backends import cgroups
from interceptor.bpf import connect, links, places
from interceptor.bpf.cookie import netns_cookie_of
from interceptor.bpf.programs import SECTIONS
from interceptor.bpf.syscall import BpfError, Buffer, checked, raw_bpf
from tests.rig.crashing import BPFFS
from tests.rig.sockets import name_of

PROG_QUERY = 16  # enum bpf_cmd, linux/bpf.h


@contextmanager
def own_cgroup(*parts: str) -> Iterator[str]:
    """This process is in a cgroup of its own within the block: its path, as --capture-cgroup takes it."""
    mounted = Path(cgroups.mount_point())
    before = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    path = "/".join((f"itc-t-{os.getpid()}", *parts))
    made = [mounted / "/".join(path.split("/")[: depth + 1]) for depth in range(len(parts) + 1)]
    for directory in made:
        directory.mkdir()
    try:
        (made[-1] / "cgroup.procs").write_text(str(os.getpid()))
        yield path
    finally:
        (mounted / before.strip("/") / "cgroup.procs").write_text(str(os.getpid()))
        for directory in reversed(made):
            directory.rmdir()


@contextmanager
def own_bpffs() -> Iterator[str]:
    """A bpffs that this process alone uses, in place of the machine's: the directory."""
    before = places.BPFFS
    with tempfile.TemporaryDirectory(prefix="itc-t-bpf-") as directory:
        links.mount_bpffs(directory)
        places.BPFFS = os.environ[BPFFS] = directory
        try:
            yield directory
        finally:
            places.BPFFS = before
            del os.environ[BPFFS]
            subprocess.run(["umount", directory], check=True)


def attached(path: str) -> int:
    """How many programs of the kinds that we use run for a cgroup, whoever attached them (BPF_PROG_QUERY)."""
    directory = os.open(cgroups.directory(path, "--capture-cgroup"), os.O_RDONLY)
    try:
        return sum(programs_at(directory, kind) for section, (_, kind) in SECTIONS.items() if not section.startswith("tcx"))
    finally:
        os.close(directory)


def programs_at(target: int, kind: int) -> int:
    """How many programs are attached as `kind` says to a cgroup's descriptor, or to the interface of that number."""
    ids = Buffer(256)
    # struct: target_fd or target_ifindex, attach_type, query_flags, attach_flags, prog_ids, count, ..., revision: written, too
    attr = Buffer(struct.pack("=IIIIQI36x", target, kind, 0, 0, ids.address, ids.size // 4))
    checked(raw_bpf()(PROG_QUERY, attr.address, attr.size))
    return int(struct.unpack_from("=I", attr.content, 24)[0])


# As a proxy does, the servers keep the map that they have once opened: what was captured before a change is still in it.
_opened: dict[tuple[int, int], connect.Originals] = {}


def original_of(connection: socket.socket) -> str | None:
    """Where a connection was going before it was rewritten; None when it was not."""
    try:
        cookie = netns_cookie_of(connection)
    except BpfError:
        return None  # before Linux 5.14, where nothing is captured at connect()
    with suppress(OSError, BpfError):
        inode = os.stat(os.path.join(places.connect_directory(cookie), connect.ORIGINALS)).st_ino
        if (cookie, inode) not in _opened:
            _opened[cookie, inode] = connect.Originals(cookie)
    client, local = connection.getpeername(), connection.getsockname()
    for of, originals in _opened.items():
        found = originals.find(client, local) if of[0] == cookie else None
        if found is not None:
            originals.forget(client, local)
            return name_of(found.address)
    return None
