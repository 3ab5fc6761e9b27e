"""Install on a node, uninstall, and say how it stands. Each verb can be repeated, and mends what one that was killed has left.

The order keeps the node working at every moment: a conflist that names a binary which isn't there fails every pod, and so does
one whose agent doesn't listen. So: binary, then socket, then conflist; and back in reverse.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cni.install import conflist, files
from cni.install.files import InstallError

BINARY_MODE = 0o755
# How often the conflist is begun anew when somebody else writes it at the same time.
TRIES = 10
SOCKET_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Node:
    """What is to stand where. `only` is the one conflist to change, whatever a runtime would choose."""

    net_dir: str
    bin_dir: str
    entry: dict[str, Any] = field(default_factory=dict)
    binary: bytes = b""
    only: str | None = None

    @property
    def binary_path(self) -> str:
        """Where a runtime looks for the plugin."""
        return os.path.join(self.bin_dir, conflist.TYPE)

    @property
    def agent_socket(self) -> str | None:
        """The socket that the entry names."""
        path = self.entry.get("agentSocket")
        return path if isinstance(path, str) else None


@dataclass(frozen=True, slots=True)
class Change:
    """One file before and after; None where there is none."""

    path: str
    before: bytes | None
    after: bytes | None

    def diff(self) -> str:
        """The change as a reader wants it: a unified diff of text, a line for a binary, "" where nothing changes."""
        if self.before == self.after:
            return ""
        if self.path.endswith(conflist.TYPE):
            if self.after is None:
                return f"{self.path}: removed\n"
            return f"{self.path}: {'written' if self.before is None else 'replaced'}, {len(self.after)} bytes\n"
        import difflib

        before, after = (
            (content or b"").decode(errors="replace").splitlines(keepends=True) for content in (self.before, self.after)
        )
        return "".join(difflib.unified_diff(before, after, fromfile=self.path, tofile=self.path))


@dataclass(frozen=True, slots=True)
class Status:
    """How a node stands. `problems` is empty when every pod will get what is wanted; `conflist` is the file with our entry."""

    conflist: str | None
    problems: tuple[str, ...]


def changes_to_install(node: Node) -> list[Change]:
    """What install() would write. Raises InstallError when there is no configuration to stand behind."""
    return [_binary_change(node, node.binary), *_list_changes(node)]


def changes_to_uninstall(node: Node) -> list[Change]:
    """What uninstall() would write."""
    return [*_changes_without_entry(node), _binary_change(node, None)]


def install(node: Node, socket_wait_s: float = 30.0) -> list[Change]:
    """Put everything in its place; what was changed, in order.

    Raises InstallError, with the node as it was or further on its way, never with a conflist before what it needs.
    """
    done = []
    try:
        os.makedirs(node.bin_dir, exist_ok=True)
    except OSError as error:
        raise InstallError(f"{node.bin_dir}: {error.strerror}") from error
    binary = _binary_change(node, node.binary)
    if _apply(binary, BINARY_MODE):
        done.append(binary)
    if node.agent_socket is not None:
        _wait_for_agent(node.agent_socket, socket_wait_s)
    return done + put_entry(node)


def put_entry(node: Node) -> list[Change]:
    """The conflist's part of install(): begun anew as long as somebody else writes it under our hands."""
    for _ in range(TRIES):
        changes = [change for change in _list_changes(node) if change.before != change.after]
        applied = all(_apply(change) for change in changes)
        if applied and not any(change.before != change.after for change in _list_changes(node)):
            if changes:
                files.poke(node.net_dir)
            return changes
    raise InstallError(f"{node.net_dir}: another program rewrites the conflist all the time")


def uninstall(node: Node) -> list[Change]:
    """Take everything away; what was changed. Succeeds when nothing is there. Raises InstallError."""
    done = []
    for _ in range(TRIES):
        changes = [change for change in _changes_without_entry(node) if change.before != change.after]
        if not changes:
            break
        done += [change for change in changes if _apply(change)]
        files.poke(node.net_dir)
    else:
        # The binary stays: a conflist that names one which isn't there fails every pod.
        raise InstallError(f"{node.net_dir}: another program rewrites the conflist all the time; nothing else was removed")
    binary = _binary_change(node, None)
    if _apply(binary):
        done.append(binary)
    for folder in (node.net_dir, node.bin_dir):
        _remove_temporary(folder)
    return done


def status(node: Node) -> Status:
    """How the node stands, reading only. An empty `node.entry` or `node.binary` means: any of ours will do.

    Raises InstallError where it cannot be looked at.
    """
    found = _file_with_entry(node)
    problems = list(_binary_problems(node))
    if found is None:
        problems.append(f"{node.net_dir}: no conflist has our entry: new pods are not captured")
        return Status(None, tuple(problems))
    name, entry, is_last = found
    if node.entry and entry != node.entry:
        problems.append(f"{name}: our entry is not the one that is wanted")
    if not is_last:
        problems.append(f"{name}: another plugin stands behind our entry")
    loaded = files.find_loaded(node.net_dir, node.only)
    if _goes_before_ours(loaded) if name == files.OWN_LIST else loaded is None or loaded.name != name:
        problems.append(f"{name}: runtimes load {loaded.name if loaded else 'nothing'} instead")
    path = entry.get("agentSocket")
    if isinstance(path, str) and not _is_live(path):
        problems.append(f"{path}: the node agent does not listen: new pods wait")
    return Status(name, tuple(problems))


def _binary_change(node: Node, wanted: bytes | None) -> Change:
    return Change(node.binary_path, _content(node.binary_path), wanted)


def _binary_problems(node: Node) -> Iterator[str]:
    present = _content(node.binary_path)
    if present is None:
        yield f"{node.binary_path}: missing: a conflist that names it fails every pod"
    elif node.binary and present != node.binary:
        yield f"{node.binary_path}: not the version that is wanted"
    elif not os.access(node.binary_path, os.X_OK):
        yield f"{node.binary_path}: not executable"


def _list_changes(node: Node) -> list[Change]:
    loaded = files.find_loaded(node.net_dir, node.only)
    own = os.path.join(node.net_dir, files.OWN_LIST)
    if loaded is None:
        where = node.net_dir if node.only is None else os.path.join(node.net_dir, node.only)
        raise InstallError(f"{where}: no valid network configuration; the primary plugin's comes first")
    if not loaded.is_list:
        if _goes_before_ours(loaded):
            expected = f"rename it, since runtimes would go on loading it before {files.OWN_LIST}"
            raise InstallError(f"{os.path.join(node.net_dir, loaded.name)}: {expected}")
        # Never in place: a runtime takes it for a list only under another name, and its owner would not find it again.
        return [Change(own, _content(own), conflist.as_list(loaded.text, node.entry, loaded.name).encode())]
    path = os.path.join(node.net_dir, loaded.name)
    edited = Change(path, files.encoded(loaded.text), files.encoded(conflist.with_entry(loaded.text, node.entry)))
    # Ours stood in for a single configuration that has become a list since.
    return [edited, Change(own, _content(own), None)]


def _goes_before_ours(loaded: files.Loaded | None) -> bool:
    return loaded is not None and loaded.name < files.OWN_LIST


def _changes_without_entry(node: Node) -> list[Change]:
    changes = []
    for name in files.names(node.net_dir):
        path = os.path.join(node.net_dir, name)
        if name == files.OWN_LIST:
            changes.append(Change(path, _content(path), None))
        elif name.endswith(files.LIST_SUFFIX):
            with suppress(OSError, conflist.ConflistError):
                text = files.read(path)
                changes.append(Change(path, files.encoded(text), files.encoded(conflist.without_entry(text))))
    return changes


def _file_with_entry(node: Node) -> tuple[str, dict[str, Any], bool] | None:
    for name in files.names(node.net_dir):
        if not name.endswith(files.LIST_SUFFIX) or node.only not in (None, name):
            continue
        with suppress(OSError, conflist.ConflistError):
            plugins = conflist.validate(files.read(os.path.join(node.net_dir, name)))["plugins"]
            ours = [plugin for plugin in plugins if plugin["type"] == conflist.TYPE]
            if ours:
                return name, ours[0], plugins[-1] is ours[-1]
    return None


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallError(f"reading {path}: {error.strerror}") from error


def _apply(change: Change, mode: int | None = None) -> bool:
    """Whether the file is as wanted now and was not before; False, too, when another program has changed it since."""
    if change.before == change.after:
        return False
    if change.after is None:
        return files.remove(change.path)
    if change.before is not None and mode is None:
        return files.replace(change.path, change.before, change.after)
    files.write(change.path, change.after, mode)
    return True


def _remove_temporary(folder: str) -> None:
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.endswith(files.TEMPORARY) or name == files.POKE:
                files.remove(os.path.join(folder, name))


def _wait_for_agent(path: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _is_live(path):
        if time.monotonic() >= deadline:
            raise InstallError(f"{path}: the node agent does not listen; the conflist was left as it is")
        time.sleep(SOCKET_POLL_S)


def _is_live(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(path)
        except OSError:
            return False
    return True
