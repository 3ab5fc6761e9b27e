"""What capture at connect() needs: a cgroup that the test's own process is in, and a bpffs. And what it left, read by hand."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interceptor.backends import cgroups
from interceptor.bpf import connect, links
from tests.rig.sockets import name_of


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
    before = connect.BPFFS
    with tempfile.TemporaryDirectory(prefix="itc-t-bpf-") as directory:
        links.mount_bpffs(directory)
        connect.BPFFS = directory
        try:
            yield directory
        finally:
            connect.BPFFS = before
            subprocess.run(["umount", directory], check=True)


def original_of(connection: socket.socket) -> str | None:
    """Where a connection was going before it was rewritten; None when it was not."""
    cookie = connect.netns_cookie_of(connection)
    if not os.path.isdir(connect.directory(cookie)):
        return None
    client, local = connection.getpeername(), connection.getsockname()
    originals = connect.Originals(cookie)
    try:
        found = originals.find(client, local)
        originals.forget(client, local)
    finally:
        originals.close()
    return name_of(found.address) if found else None
