"""What takes long to build is kept in build/kernels, each under the hash of all that it is made from."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
STORE = ROOT / "build" / "kernels"


def kept(name: str, made_from: str, make: Callable[[Path], None]) -> Path:
    """The directory `name`-<hash of `made_from`>; `make` fills it when it is not there yet. All of it or nothing."""
    place = STORE / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    if not place.is_dir():
        STORE.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=STORE))
        try:
            make(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return place


def run(*argv: str | Path, cwd: Path | None = None, timeout_s: float = 600.0) -> str:
    """The stdout of a program that must succeed; its last words when it does not."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout_s, errors="replace")
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
