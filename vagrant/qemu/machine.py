"""Boot one machine under plain QEMU, let it run one script, and bring back its log, its files and the script's exit status.

Always TCG: that /dev/kvm exists does not say that it works, and a machine that hangs early looks like a failed test.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vagrant.qemu import initramfs
from vagrant.qemu.debian import Userland, kernel, userland
from vagrant.qemu.store import ROOT, STORE, kept, run

# 6.12 panics now and then in cmpxchg16b as QEMU 7.2 emulates it.
CPU = "max,-cx16"
MEMORY_MIB = "1024"
OUT_SIZE = 32 << 20
STATUS = re.compile(rb"^MACHINE-STATUS=(\d+)\r?$", re.MULTILINE)
# Built, so unknown to git, and tested in the machine.
BUILT = ("build/cni/interceptor-cni",)
# Emulated, compiling the project takes longer than the tests; the machine's own Python does it outside.
COMPILE = 'mount --bind "$1" "$2/project" && exec chroot "$2" /opt/venv/bin/python3 -m compileall -q /project'
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
    processor_s: float  # what the machine used of one: what it would take where nobody else works
    log: str
    files: dict[str, bytes] = field(default_factory=dict)


def boot(hardware: Hardware, script: str, *, timeout_s: float) -> Outcome:
    """Run the shell `script` in /project, as root; never longer than `timeout_s`, then the machine is killed."""
    chosen, system = kernel(hardware.kernel), userland(hardware.userland)
    recipe = f"{chosen.image} {system.image} {hardware.without_modules} {Path(initramfs.__file__).read_text()}"
    early = kept(
        f"initramfs-{hardware.kernel}",
        recipe,
        lambda place: initramfs.write(place / "initramfs", chosen, system.tree / "bin/busybox", hardware.without_modules),
    )
    with tempfile.TemporaryDirectory(prefix=".run-", dir=STORE) as folder:
        disks = [system.image, _project(Path(folder), system, script, hardware.without_files), _blank(Path(folder))]
        log = Path(folder) / "log"
        argv = _argv(chosen.image, early / "initramfs", hardware.append, log)
        for disk, snapshot in zip(disks, ("on", "on", "off"), strict=True):
            argv += ["-drive", f"file={disk},format=raw,if=virtio,snapshot={snapshot}"]
        started = time.monotonic()
        processor_s = _run_for(argv, timeout_s)
        seconds = time.monotonic() - started
        said = log.read_bytes()
        status = STATUS.findall(said)
        return Outcome(
            int(status[-1]) if status else NO_STATUS,
            seconds,
            processor_s,
            said.decode(errors="replace"),
            _files(disks[-1]) if status else {},
        )


def _argv(image: Path, early: Path, append: str, log: Path) -> list[str]:
    return [
        # Ends with us, whoever ends us.
        *("setpriv", "--pdeathsig", "KILL"),
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", CPU, "-m", MEMORY_MIB, "-smp", "1"),
        *("-nographic", "-nodefaults", "-no-reboot", "-serial", f"file:{log}"),
        *("-kernel", str(image), "-initrd", str(early)),
        *("-append", f"console=ttyS0 quiet panic=-1 mitigations=off {append}"),
    ]


def _run_for(argv: list[str], timeout_s: float) -> float:
    """Run QEMU to its end or for so long; the processor time it used, to a second."""
    # QEMU's own exit status says nothing about the test; the log does.
    import psutil

    deadline, used = time.monotonic() + timeout_s, 0.0
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as qemu:
        try:
            while qemu.poll() is None and time.monotonic() < deadline:
                times = psutil.Process(qemu.pid).cpu_times()
                used = times.user + times.system
                with suppress(subprocess.TimeoutExpired):
                    qemu.wait(1)
        finally:
            qemu.kill()
    return used


def _project(folder: Path, system: Userland, script: str, without_files: tuple[str, ...]) -> Path:
    """The project as git sees it, uncommitted changes and all, and what to run, as a disk that is a tar archive."""
    staged = folder / "project"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in (*filter(None, listed.split("\0")), *BUILT):
        if (ROOT / name).exists():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, staged / name, follow_symlinks=False)
    (staged / "machine-script").write_text(script)
    (staged / "machine-without").write_text("\n".join((*without_files, "")))
    run("unshare", "--mount", "sh", "-c", COMPILE, "sh", staged, system.tree)
    archive = folder / "project.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(staged, ".")
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
