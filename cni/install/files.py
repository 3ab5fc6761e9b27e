"""Files of a node's CNI directories: which one a runtime loads, and writing one so that nobody ever sees half of it."""

from __future__ import annotations

import ctypes
import os
import stat
from contextlib import suppress
from dataclasses import dataclass

from cni.install import conflist

# What libcni's ConfFiles takes (kubelet, containerd, CRI-O); it loads the first valid one in the order of names.
LIST_SUFFIX = ".conflist"
SINGLE_SUFFIXES = (".conf", ".json")
# No runtime loads these, nor does one see a difference between them and an editor's.
TEMPORARY = ".interceptor-new"
POKE = ".interceptor-poke"
# Sorts before whatever single configuration it takes the place of.
OWN_LIST = "00-interceptor.conflist"
NEW_MODE = 0o600
AT_FDCWD = -100  # linux/fcntl.h
RENAME_EXCHANGE = 2  # linux/fs.h


class InstallError(Exception):
    """Something on the node is in the way; the text says what."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The configuration that a runtime loads: its file's name, its text, and whether it is a list."""

    name: str
    text: str
    is_list: bool


def find_loaded(folder: str, only: str | None = None) -> Loaded | None:
    """The first valid configuration in `folder`, as libcni chooses; our own list is not looked at. None: there is none yet.

    `only` is the file to take whatever else is there. Raises InstallError when the folder cannot be read.
    """
    for name in names(folder):
        is_list = name.endswith(LIST_SUFFIX)
        if name == OWN_LIST or (only is not None and name != only) or not (is_list or name.endswith(SINGLE_SUFFIXES)):
            continue
        with suppress(OSError, conflist.ConflistError):
            text = read(os.path.join(folder, name))
            if is_list:
                conflist.validate(text)
            else:
                conflist.as_list(text, {"type": conflist.TYPE}, name)
            return Loaded(name, text, is_list)
    return None


def names(folder: str) -> list[str]:
    """The names in `folder`, in the order in which runtimes look; none where there is no folder. Raises InstallError."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InstallError(f"{folder}: {error.strerror}") from error


def read(path: str) -> str:
    """The file's text; encoded() gives its bytes back, also where they are no UTF-8, which runtimes load. Raises OSError."""
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "surrogateescape")


def encoded(text: str) -> bytes:
    """What read() made text of, as bytes."""
    return text.encode("utf-8", "surrogateescape")


def write(path: str, content: bytes, mode: int | None = None) -> None:
    """Put `content` in the place of the file at `path`, whole or not at all, as the same owner's and with the same mode.

    `mode` is for a file that must have it; else a new one gets NEW_MODE. Beside and renamed: writing in place would show a
    runtime half a file, and fail for a binary that runs. Raises InstallError.
    """
    try:
        _write(path, content, mode)
    except OSError as error:
        raise InstallError(f"writing {path}: {error.strerror}") from error


def replace(path: str, expected: bytes, content: bytes) -> bool:
    """As write(), if the file holds `expected` at the moment it is replaced; else nothing, and False. Raises InstallError.

    The old file comes out by the same step that puts the new one in (RENAME_EXCHANGE, renameat2(2)): what another program wrote
    since we read it is seen, and goes back.
    """
    path = os.path.realpath(path)  # a link stays one
    new = _temporary(path)
    try:
        _prepare(path, new, content, None)
        _exchange(new, path)
        with open(new, "rb") as file:
            is_expected = file.read() == expected
        if not is_expected:
            _exchange(new, path)
            with open(new, "rb") as file:
                if file.read() != content:
                    # And once more since: that is the newest.
                    os.rename(new, path)
                    return False
        os.unlink(new)
    except OSError as error:
        with suppress(OSError):
            os.unlink(new)
        raise InstallError(f"writing {path}: {error.strerror}") from error
    _sync(os.path.dirname(path))
    return is_expected


def _exchange(one: str, other: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _temporary(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}{TEMPORARY}")


def _write(path: str, content: bytes, mode: int | None) -> None:
    new = _temporary(path)
    try:
        _prepare(path, new, content, mode)
        os.rename(new, path)
    except OSError:
        with suppress(OSError):
            os.unlink(new)
        raise
    _sync(os.path.dirname(path))


def _prepare(path: str, new: str, content: bytes, mode: int | None) -> None:
    before = os.stat(path) if os.path.exists(path) else None
    with suppress(FileNotFoundError):
        os.unlink(new)  # of a run that was killed
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if before is not None:
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
        os.fchmod(file.fileno(), mode if mode is not None else stat.S_IMODE(before.st_mode) if before else NEW_MODE)
        os.fsync(file.fileno())


def remove(path: str) -> bool:
    """Remove the file; whether there was one. Raises InstallError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InstallError(f"removing {path}: {error.strerror}") from error
    _sync(os.path.dirname(path))
    return True


def poke(folder: str) -> None:
    """Make a runtime read `folder` again: containerd overlooks some renames, and never a file that comes and goes."""
    path = os.path.join(folder, POKE)
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.unlink(path)


def _sync(folder: str) -> None:
    """Once a name in `folder` has changed: it stays so if the machine loses power. Raises InstallError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InstallError(f"writing {folder}: {error.strerror}; run this again") from error
