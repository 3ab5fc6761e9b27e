"""Boot one machine under plain QEMU, let it run one script, and bring back its log, its files and the script's exit status.

Always TCG: that /dev/kvm exists does not say that it works, and a machine that hangs early looks like a failed test.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from vagrant.qemu import initramfs
from vagrant.qemu.debian import kernel, userland
from vagrant.qemu.store import ROOT, STORE, kept, run

# 6.12 panics now and then in cmpxchg16b as QEMU 7.2 emulates it.
CPU = "max,-cx16"
MEMORY_MIB = "1024"
OUT_SIZE = 32 << 20
STATUS = re.compile(rb"^MACHINE-STATUS=(\d+)\r?$", re.MULTILINE)
NO_STATUS = 255  # it never came to the end: a panic, or out of time


@dataclass(frozen=True, slots=True)
class Hardware:
    """What to boot: kernel and userland by Debian suite, and what they lack."""

    kernel: str
    userland: str = "bookworm"
    without_modules: tuple[str, ...] = ()  # patterns of module names
    without_files: tuple[str, ...] = ()  # patterns of paths, removed before anything runs
    append: str = ""  # to the kernel's command line


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. `files` is what the script left in /out."""

    status: int
    seconds: float
    log: str
    files: dict[str, bytes] = field(default_factory=dict)


def boot(hardware: Hardware, script: str, *, timeout_s: float) -> Outcome:
    """Run the shell `script` in /project, as root; never longer than `timeout_s`, then the machine is killed."""
    chosen, system = kernel(hardware.kernel), userland(hardware.userland)
    recipe = f"{chosen.image} {system.image} {hardware.without_modules} {Path(initramfs.__file__).read_text()}"
    early = kept(
        f"initramfs-{hardware.kernel}",
        recipe,
        lambda place: initramfs.write(place / "initramfs", chosen, system.busybox, hardware.without_modules),
    )
    with tempfile.TemporaryDirectory(prefix=".run-", dir=STORE) as folder:
        disks = [system.image, _project(Path(folder), script, hardware.without_files), _blank(Path(folder))]
        log = Path(folder) / "log"
        argv = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", CPU, "-m", MEMORY_MIB, "-smp", "1"]
        argv += ["-nographic", "-nodefaults", "-no-reboot", "-serial", f"file:{log}"]
        argv += ["-kernel", str(chosen.image), "-initrd", str(early / "initramfs")]
        argv += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off {hardware.append}"]
        for disk, snapshot in zip(disks, ("on", "on", "off"), strict=True):
            argv += ["-drive", f"file={disk},format=raw,if=virtio,snapshot={snapshot}"]
        started = time.monotonic()
        _run_for(argv, timeout_s)
        seconds = time.monotonic() - started
        said = log.read_bytes()
        status = STATUS.findall(said)
        return Outcome(
            int(status[-1]) if status else NO_STATUS,
            seconds,
            said.decode(errors="replace"),
            _files(disks[-1]) if status else {},
        )


def _run_for(argv: list[str], timeout_s: float) -> None:
    # QEMU's own exit status says nothing about the test; the log does.
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as qemu:
        try:
            qemu.wait(timeout_s)
        except subprocess.TimeoutExpired:
            qemu.kill()
        except BaseException:
            qemu.kill()
            raise


def _project(folder: Path, script: str, without_files: tuple[str, ...]) -> Path:
    """The project as git sees it, uncommitted changes and all, and what to run, as a disk that is a tar archive."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    archive = folder / "project.tar"
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():
                tar.add(ROOT / name, name, recursive=False)
        for name, text in (("machine-script", script), ("machine-without", "\n".join((*without_files, "")))):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    return archive


def _blank(folder: Path) -> Path:
    disk = folder / "out.tar"
    disk.touch()
    with disk.open("r+b") as file:
        file.truncate(OUT_SIZE)
    return disk


def _files(disk: Path) -> dict[str, bytes]:
    with tarfile.open(disk) as tar:
        members = [member for member in tar if member.isfile()]
        return {member.name.removeprefix("./"): found.read() for member in members if (found := tar.extractfile(member))}
