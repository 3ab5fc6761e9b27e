"""The containers' image: Debian's static busybox and a web page, packed here as `docker save` would. No registry."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

BUSYBOX = Path("/bin/busybox")  # busybox-static
APPLETS = ("sh", "sleep", "nc", "httpd", "cat", "ip", "id")
PAGE = "hello from the application\n"
PORT = 8080
NAME = "localhost/app:1"
# The application: a web server on both families, as a user of its own.
# The image alone sleeps, so that it is CRI's pause image too.
COMMAND = ("httpd", "-f", "-p", str(PORT), "-h", "/www")
UID = 1000


def archive() -> bytes:
    """The image, as every runtime loads it."""
    layer = _layer()
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["sleep", "600"], "User": f"{UID}:{UID}", "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [NAME], "Layers": [f"{digest}.tar"]}]).encode()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for path, content in ((f"{digest}.tar", layer), (name, config), ("manifest.json", manifest)):
            _add(tar, path, content=content)
    return made.getvalue()


def _layer() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for folder in ("bin", "etc", "www", "tmp", "proc", "sys", "dev"):
            _add(tar, folder, tarfile.DIRTYPE, mode=0o755)
        _add(tar, "bin/busybox", content=BUSYBOX.read_bytes(), mode=0o755)
        for name in APPLETS:
            _add(tar, f"bin/{name}", tarfile.SYMTYPE, link="busybox")
        _add(tar, "etc/passwd", content=b"root:x:0:0::/:/bin/sh\n")
        _add(tar, "www/index.html", content=PAGE.encode())
    return made.getvalue()


def _add(
    tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, *, content: bytes = b"", mode: int = 0o644, link: str = ""
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.mode, entry.linkname = kind, len(content), mode, link
    tar.addfile(entry, io.BytesIO(content))
