"""Keep the packet relay's programs, maps and links in a bpffs, so that flows outlive the proxy and the next one finds them.

A directory holds one build's: another build has structs of its own, so its flows are left to its programs until they end.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from importlib import resources

from interceptor.bpf import links
from interceptor.bpf.maps import Map
from interceptor.bpf.syscall import BpfError
from interceptor.errors import ProxyError

LINK, MAP, RING = "link-", "map-", "ring-"


def directory(base: str) -> str:
    """This build's directory below `base`, made if missing; `base` gets a bpffs if it has none. Raises ProxyError."""
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        if not links.is_bpffs(base):
            links.mount_bpffs(base)
        path = os.path.join(base, f"packet-{_build()}")
        os.makedirs(path, mode=0o700, exist_ok=True)
    except (OSError, BpfError) as error:
        raise ProxyError(f"--packet-pins {base}: {error}") from error
    return path


def names(path: str, kind: str) -> list[str]:
    """What of this kind an earlier proxy left; rings are named by worker."""
    return [name.removeprefix(kind) for name in sorted(os.listdir(path)) if name.startswith(kind)]


def pinned_map(path: str, kind: str, name: str) -> Map:
    """One of the maps, or rings. Raises BpfError."""
    return links.open_pinned_map(os.path.join(path, kind + name))


def pinned_link(path: str, name: str) -> links.Link:
    """One of the links. Raises BpfError."""
    return links.open_pinned_link(os.path.join(path, LINK + name))


def keep(path: str, kind: str, name: str, descriptor: int) -> None:
    """Pin one of these, unless it is. Raises BpfError."""
    target = os.path.join(path, kind + name)
    if not os.path.exists(target):
        links.pin(descriptor, target)


def discard(path: str) -> None:
    """Remove all pins: what nobody has open is detached and gone."""
    for name in os.listdir(path):
        links.unpin(os.path.join(path, name))
    with suppress(OSError):
        os.rmdir(path)


def _build() -> str:
    content = resources.files("interceptor.bpf").joinpath("objects", "packet.bpf.o").read_bytes()
    return hashlib.sha256(content).hexdigest()[:12]
