"""The initramfs: busybox, the modules that a machine may have, and a script that mounts the root. Writes one file.

What a variant's kernel lacks is left out here, so it lacks it for good: there is no other copy of a module in the machine.
"""

from __future__ import annotations

import fnmatch
import lzma
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vagrant.qemu.debian import Kernel
from vagrant.qemu.store import run

BOOT = ("virtio_pci", "virtio_blk", "ext4")
# Below kernel/; a directory stands for all that is in it. With what they depend on.
WANTED = (
    "crypto/crc32c_generic.ko",  # ext4 and nf_conntrack ask for it by name, not by symbol
    "net/802",
    "net/8021q",
    "net/bridge",
    "net/core",
    "net/ipv4",
    "net/ipv6",
    "net/llc",
    "net/netfilter",
    "net/netlink",
    "net/packet",
    "net/sched",
    "net/unix",
    "drivers/net/dummy.ko",
    "drivers/net/ifb.ko",
    "drivers/net/tun.ko",
    "drivers/net/veth.ko",
)
INIT = """\
#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
ln -s bin /sbin
mkdir -p /proc /sys /dev /root
mount -t devtmpfs dev /dev
for module in {boot}; do modprobe "$module"; done
while [ ! -b /dev/vdc ]; do sleep 0.1; done
mount -t ext4 /dev/vda /root
mkdir -p /root/lib/modules /root/project /root/out
cp -a /lib/modules/{release} /root/lib/modules/
tar -x -C /root/project -f /dev/vdb
mount --move /dev /root/dev
exec switch_root /root /project/vagrant/qemu/guest/init
"""


def write(target: Path, kernel: Kernel, busybox: Path, without: Sequence[str]) -> None:
    """Write the cpio to `target`; modules whose names match a pattern of `without` stay out, and all that need them."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        top = Path(folder)
        modules = top / "lib/modules" / kernel.release
        chosen = _chosen(kernel, without)
        for path in chosen:
            (modules / path).parent.mkdir(parents=True, exist_ok=True)
            _copy_uncompressed(kernel.modules / path, modules / path)
        for listed in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            shutil.copy(kernel.modules / listed, modules / listed)
        run("depmod", "-b", top, kernel.release)
        (top / "bin").mkdir()
        shutil.copy(busybox, top / "bin/busybox")
        (top / "init").write_text(INIT.format(boot=" ".join(BOOT), release=kernel.release))
        (top / "init").chmod(0o755)
        target.write_bytes(b"".join(_cpio(top)))


def _copy_uncompressed(module: Path, target: Path) -> None:
    """As busybox can load it; emulated, undoing xz takes longer than reading more."""
    if module.suffix == ".xz":
        target.with_suffix("").write_bytes(lzma.decompress(module.read_bytes()))
    else:
        shutil.copy(module, target)


def _chosen(kernel: Kernel, without: Sequence[str]) -> list[str]:
    needs = _needs(kernel.modules)
    wanted = [path for path in needs if _is_wanted(path)]
    chosen = {path: None for each in wanted for path in (each, *needs[each])}
    left_out = {path for path in needs if any(fnmatch.fnmatchcase(_name(path), pattern) for pattern in without)}
    return [path for path in chosen if not left_out & {path, *needs[path]}]


def _is_wanted(path: str) -> bool:
    inside = path.split("/", 1)[1].removesuffix(".xz")
    return _name(path) in BOOT or any(inside == wanted or inside.startswith(f"{wanted}/") for wanted in WANTED)


def _needs(modules: Path) -> dict[str, list[str]]:
    """Module -> all that it depends on, the first needed last (depmod(8))."""
    lines = (line.partition(":") for line in (modules / "modules.dep").read_text().splitlines())
    return {path: rest.split() for path, _, rest in lines}


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".")[0].replace("-", "_")


def _cpio(top: Path) -> Iterator[bytes]:
    """The "newc" format of Documentation/driver-api/early-userspace/buffer-format.rst."""
    number = 0
    for number, path in enumerate(_walk(top), start=1):
        content = path.read_bytes() if path.is_file() else b""
        yield _entry(number, path.stat().st_mode, str(path.relative_to(top)), content)
    yield _entry(number + 1, 0, "TRAILER!!!", b"")


def _walk(top: Path) -> Iterable[Path]:
    return sorted(top.rglob("*"))


def _entry(inode: int, mode: int, name: str, content: bytes) -> bytes:
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)
