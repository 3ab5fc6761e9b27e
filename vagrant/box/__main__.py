"""`python -m vagrant.box SUITE`: a box for vagrant-libvirt from Debian packages alone, for where no registry can be reached.

There is neither partition nor boot loader in it: libvirt boots the kernel that lies beside the image. Python, the tools and our
dependencies are in it, as the machine may have no network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vagrant.qemu.debian import PACKAGES, Kernel, inside, kernel, populate, requirements
from vagrant.qemu.store import STORE, run

# Suite of the kernel -> suite of the rest; bullseye's own Python is too old for us.
SUITES = {"bookworm": "bookworm", "trixie": "trixie", "bullseye": "bookworm"}
MACHINE = ("dbus", "initramfs-tools", "openssh-server", "rsync", "sudo", "systemd-sysv", "udev")
SIZE_GIB = 2
INITRAMFS_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic")
NETWORK = "[Match]\nName=e*\n[Network]\nDHCP=yes\n"
# The key pair that every Vagrant knows: these machines are thrown away.
INSECURE_KEY = Path(__file__).parent / "vagrant.pub"
VAGRANTFILE = """\
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |libvirt|
    libvirt.kernel = File.join(__dir__, "vmlinuz")
    libvirt.initrd = File.join(__dir__, "initrd")
    libvirt.cmd_line = "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet mitigations=off"
  end
end
"""


def main() -> int:
    """Build it and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m vagrant.box", description=__doc__)
    parser.add_argument("suite", choices=SUITES, help="the Debian suite of the kernel")
    parser.add_argument("--nft-only", action="store_true", help="without the package iptables")
    arguments = parser.parse_args()
    name = f"interceptor-{arguments.suite}{'-nft' if arguments.nft_only else ''}"
    boxes = STORE / "boxes"
    boxes.mkdir(parents=True, exist_ok=True)
    left_out = ("iptables",) if arguments.nft_only else ()
    with tempfile.TemporaryDirectory(prefix=".box-", dir=STORE) as folder:
        _build(arguments.suite, left_out, Path(folder))
        _pack(Path(folder), boxes / f"{name}.box")
    print(f"vagrant box add --name {name} {boxes / name}.box")
    return 0


def _build(suite: str, left_out: Sequence[str], folder: Path) -> None:
    tree, chosen = folder / "tree", kernel(suite)
    packages = [name for name in (*PACKAGES, *MACHINE) if name not in left_out]
    populate(tree, SUITES[suite], packages, requirements())
    _install_kernel(tree, chosen)
    shutil.copy(chosen.image, folder / "vmlinuz")
    (tree / "boot" / f"initrd.img-{chosen.release}").rename(folder / "initrd")
    _configure(tree)
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, folder / "root.ext4", f"{SIZE_GIB}G")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "root.ext4", folder / "box.img")


def _install_kernel(tree: Path, chosen: Kernel) -> None:
    modules = tree / "lib/modules" / chosen.release
    shutil.copytree(chosen.modules, modules)
    # A small one: emulated, unpacking Debian's takes longer than booting.
    (tree / "etc/initramfs-tools/modules").write_text("\n".join((*INITRAMFS_MODULES, "")))
    (tree / "etc/initramfs-tools/conf.d/small").write_text("MODULES=list\n")
    # Asked for the compression that the kernel can undo; the rest of it is of no use here.
    (tree / "boot" / f"config-{chosen.release}").write_text("CONFIG_RD_GZIP=y\n")
    (tree / "etc/initramfs-tools/conf.d/compression").write_text("COMPRESS=gzip\n")
    inside(tree, "update-initramfs", "-c", "-k", chosen.release)


def _configure(tree: Path) -> None:
    # Where /opt/venv looks for the project, with -I as well.
    (tree / "project").symlink_to("/interceptor")
    (tree / "etc/systemd/network/80-dhcp.network").write_text(NETWORK)
    inside(tree, "systemctl", "enable", "systemd-networkd", "ssh")
    inside(tree, "useradd", "--create-home", "--shell", "/bin/bash", "vagrant")
    ssh = tree / "home/vagrant/.ssh"
    ssh.mkdir(mode=0o700)
    shutil.copy(INSECURE_KEY, ssh / "authorized_keys")
    inside(tree, "chown", "-R", "vagrant:vagrant", "/home/vagrant/.ssh")
    sudoers = tree / "etc/sudoers.d/vagrant"
    sudoers.write_text("vagrant ALL=(ALL) NOPASSWD: ALL\n")
    sudoers.chmod(0o440)
    # A reverse lookup without a resolver delays every login.
    (tree / "etc/ssh/sshd_config.d/dns.conf").write_text("UseDNS no\n")


def _pack(folder: Path, target: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": SIZE_GIB}))
    (folder / "Vagrantfile").write_text(VAGRANTFILE)
    unfinished = target.with_suffix(".part")
    with tarfile.open(unfinished, "w:gz", compresslevel=1) as box:
        for name in ("metadata.json", "Vagrantfile", "vmlinuz", "initrd", "box.img"):
            box.add(folder / name, name)
    unfinished.rename(target)


if __name__ == "__main__":
    sys.exit(main())
