"""Kernels and root file systems from Debian packages alone. Needs root, mmdebstrap and e2fsprogs; starts no machine.

Kernel and userland are independent: bullseye's kernel (5.10) runs under bookworm's Python, as bullseye's own is too old for us.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vagrant.qemu.store import ROOT, kept, run

MIRROR = "http://deb.debian.org/debian"
# What the tests call, and a static busybox for the initramfs.
PACKAGES = (
    "busybox-static",
    "conntrack",
    "iproute2",
    "iptables",
    "kmod",
    "nftables",
    "procps",
    "python3",
    "python3-venv",
    "util-linux",
)
# python-iptables comes as source. Gone again from the finished image: on most hosts there is no compiler either.
COMPILER = ("gcc", "libc6-dev", "python3-dev")
# What only `make check`, `make runtimes` and tests/cni/test_kube.py import; the last is large.
NOT_FOR_TESTS = tuple(
    "cffi cryptography durationpy google-auth grimp grpcio import-linter kubernetes mypy oauthlib pyasn1 pycparser "
    "python-dateutil requests ruff types- websocket-client".split()
)
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
IMAGE_SIZE = "1200M"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image and the tree of its modules, compressed or not as Debian has them."""

    release: str
    image: Path
    modules: Path  # lib/modules/<release>


def kernel(suite: str) -> Kernel:
    """The kernel of a Debian suite."""
    # The package's version is part of the key only through apt: `make clean` fetches newer ones.
    place = kept(
        f"kernel-{suite}", f"{MIRROR} {suite} {inspect.getsource(_extract_kernel)}", lambda place: _extract_kernel(suite, place)
    )
    (modules,) = place.glob("lib/modules/*")
    return Kernel(modules.name, place / "vmlinuz", modules)


def _extract_kernel(suite: str, place: Path) -> None:
    tree = place / "tree"
    # "extract" configures nothing, so neither initramfs-tools nor a boot loader runs.
    no_recommends = "--aptopt=APT::Install-Recommends false"
    run("mmdebstrap", "--quiet", "--variant=extract", no_recommends, "--include=linux-image-amd64", suite, tree, MIRROR)
    (image,) = tree.glob("boot/vmlinuz-*")
    image.rename(place / "vmlinuz")
    (place / "lib/modules").mkdir(parents=True)
    # Before trixie, /lib is a directory of its own in an unconfigured tree.
    (modules,) = (*tree.glob("usr/lib/modules/*"), *(() if (tree / "lib").is_symlink() else tree.glob("lib/modules/*")))
    modules.rename(place / "lib/modules" / modules.name)
    shutil.rmtree(tree)
    run("depmod", "-b", place, next((place / "lib/modules").iterdir()).name)


@dataclass(frozen=True, slots=True)
class Userland:
    """A root file system: as an ext4 image, and the tree that it is made from, for what is quicker done outside."""

    image: Path
    tree: Path


def userland(suite: str) -> Userland:
    """Debian with Python, the tools, and our dependencies in /opt/venv; the project comes by a disk of its own."""
    wanted = requirements()
    recipe = (MIRROR, suite, *PACKAGES, *COMPILER, *wanted, IMAGE_SIZE, inspect.getsource(populate), "tree")
    place = kept(f"userland-{suite}", " ".join(recipe), lambda place: _build_userland(suite, wanted, place))
    return Userland(place / "root.ext4", place / "tree")


def requirements() -> list[str]:
    """The pinned lines that running and testing needs."""
    lines = (ROOT / "requirements.lock").read_text().split()
    return [line for line in lines if not line.startswith(NOT_FOR_TESTS)]


def _build_userland(suite: str, wanted: list[str], place: Path) -> None:
    tree = place / "tree"
    populate(tree, suite, PACKAGES, wanted)
    (tree / "project").mkdir()
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, place / "root.ext4", IMAGE_SIZE)


def populate(tree: Path, suite: str, packages: Sequence[str], wanted: list[str]) -> None:
    """Fill `tree` with `packages`, and with `wanted` in /opt/venv, which finds the project in /project."""
    everything = ",".join((*packages, *COMPILER))
    # A machine that fails while it is built is built again: nothing need reach the disk.
    unsafe = "--dpkgopt=force-unsafe-io"
    run("mmdebstrap", "--quiet", "--variant=minbase", unsafe, f"--include={everything}", suite, tree, MIRROR)
    wheels = tree / "wheels"
    wheels.mkdir()
    # Fetched outside: inside there is neither a resolver nor this host's certificates.
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
    source = [line for line in wanted if line.startswith("python-iptables")]
    built = [line for line in wanted if line not in source]
    run(*download, "--only-binary=:all:", "--python-version", PYTHONS[suite], *built, "setuptools", "wheel")
    run(*download, "--no-binary=python-iptables", *source)
    inside(tree, "python3", "-m", "venv", "/opt/venv")
    inside(tree, "/opt/venv/bin/pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links=/wheels", *wanted)
    (site,) = tree.glob("opt/venv/lib/python3*/site-packages")
    (site / "project.pth").write_text("/project\n")
    inside(tree, "apt-get", "purge", "--yes", "--quiet", "--autoremove", *COMPILER)
    for useless in ("wheels", "usr/share/doc", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(tree / useless, ignore_errors=True)


def inside(tree: Path, *argv: str) -> None:
    """Run a program in `tree`; raises SystemExit with its last words when it fails."""
    run("chroot", tree, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C", *argv)
