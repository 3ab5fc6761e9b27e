"""Which pods of this node were given to us, what was decided, and where their namespaces are. Knows no rule and no API.

Kept as one file each in a directory beside the agent's socket (/run: gone with the namespaces, at boot), so that a new agent
knows what an old one did. A namespace is remembered by its path as long as that leads to it from here; where the agent
cannot see the path it keeps the descriptor that came with the ADD, which keeps the namespace alive until DEL or GC.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from cni.pod import Capture, Decision
from interceptor import sources
from interceptor.config import FIELDS, Config

Key: TypeAlias = tuple[str, str]  # CNI_CONTAINERID, CNI_IFNAME: unique at any time (CNI SPEC section 3)
Identity: TypeAlias = tuple[int, int]  # device, inode of a namespace
NEW = ".new"  # a file that is being written; an interface's name ends so in theory, and then has no repair
# "early": rules of --before-proxy bypass whose proxy has not announced itself yet.
State: TypeAlias = Literal["captured", "skipped", "drifted", "early"]


@dataclass(slots=True)
class Attachment:
    """One pod's interface. `descriptor` is -1 where `path` leads to the namespace; `identity` says whether it still does."""

    key: Key
    path: str
    identity: Identity
    descriptor: int = -1
    state: State = "captured"
    pod: str = ""  # namespace/name, empty outside of Kubernetes
    network: str = ""
    since: float = 0.0  # when its ADD ended, by time.monotonic(); 0: before this agent

    @property
    def way(self) -> str | None:
        """A path that leads to the namespace now; None when it is gone."""
        if self.descriptor >= 0:
            return f"/proc/self/fd/{self.descriptor}"
        return self.path if _identity(self.path) == self.identity else None


class Attachments:
    """All of them, from any thread. Raises OSError where the directory cannot be written."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[Key, Attachment] = {}
        # Forgotten, and their files could not be removed.
        self._gone: set[str] = set()
        self.make_folder()

    def make_folder(self) -> None:
        """Make the directory, if it is not there."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)

    def put(self, attachment: Attachment, decision: Decision) -> None:
        """Remember an ADD that succeeded. `attachment.descriptor` is duplicated where the path does not lead there."""
        key = attachment.key
        attachment.since = time.monotonic()
        if _identity(attachment.path) == attachment.identity:
            attachment.descriptor = -1
        else:
            attachment.descriptor = os.dup(attachment.descriptor)
        document: dict[str, Any] = {
            "key": list(key),
            "path": attachment.path,
            "netns": list(attachment.identity),
            "state": attachment.state,
            "pod": attachment.pod,
            "network": attachment.network,
        }
        if isinstance(decision, Capture):
            # What was decided, not what it was decided by: that may need the API, and change.
            document["options"] = _options(decision.config)
            document["resolvers"] = decision.resolvers
        with self._lock:
            self._release(self._known.get(key))
            self._known[key] = attachment
            self._gone.discard(_name(key))
            _write(self._file(key), json.dumps(document).encode())

    def forget(self, key: Key) -> None:
        """A DEL, whatever became of it."""
        with self._lock:
            self._release(self._known.pop(key, None))
            self._gone.add(_name(key))
            self._remove_file(key)
            self._gone.discard(_name(key))

    def keep_only(self, network: str, valid: Iterable[Key]) -> None:
        """A GC: of `network`, only these are still there."""
        kept = set(valid)
        for attachment in self.all():
            if attachment.network == network and attachment.key not in kept:
                self.forget(attachment.key)

    def all(self) -> list[Attachment]:
        """All whose namespaces are still there; the others are forgotten.

        What another agent has noted is among them: one that is being replaced goes on for a while.
        """
        with self._lock:
            known = self._read_again()
        alive = []
        for attachment in known:
            if attachment.way is None:
                with suppress(OSError):  # a directory that is read-only now
                    self.forget(attachment.key)
            else:
                alive.append(attachment)
        return alive

    def holds(self, key: Key) -> bool:
        """Whether no DEL has come for it."""
        return os.path.exists(self._file(key))

    def wanted(self, key: Key) -> Capture | None:
        """How this pod is to be captured; None when it was deleted meanwhile, or is left alone. Raises ConfigError."""
        document = _read(self._file(key))
        if document is None or "options" not in document:
            return None
        options = sources.from_object(document["options"], f"attachment {_name(key)}")
        resolvers = document["resolvers"]
        config = sources.resolve(objects=(options,), environment={}).config
        return Capture(config, None if resolvers is None else tuple(resolvers))

    def _read_again(self) -> list[Attachment]:
        try:
            there = {name for name in os.listdir(self._folder) if not name.endswith(NEW)} - self._gone
        except FileNotFoundError:
            there = set()  # somebody has removed it
        for key in [key for key in self._known if _name(key) not in there]:
            self._release(self._known.pop(key))
        for name in there - {_name(key) for key in self._known}:
            document = _read(os.path.join(self._folder, name))
            if document is not None:
                attachment = _attachment(document)
                self._known[attachment.key] = attachment
        return list(self._known.values())

    def _file(self, key: Key) -> str:
        return os.path.join(self._folder, _name(key))

    def _remove_file(self, key: Key) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._file(key))

    @staticmethod
    def _release(attachment: Attachment | None) -> None:
        if attachment is not None and attachment.descriptor >= 0:
            os.close(attachment.descriptor)


@lru_cache(64)
def _options(config: Config) -> dict[str, str]:
    return {row.name: row.kind.show(getattr(config, row.name)) for row in FIELDS}


def _name(key: Key) -> str:
    # Neither part can hold a slash, and the first no @ (protocol.py).
    return "@".join(key)


def _attachment(document: Mapping[str, Any]) -> Attachment:
    (container, ifname), (device, inode) = document["key"], document["netns"]
    return Attachment(
        (container, ifname),
        document["path"],
        (device, inode),
        state=document["state"],
        pod=document["pod"],
        network=document["network"],
    )


def _identity(path: str) -> Identity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _write(path: str, text: bytes) -> None:
    made = path + NEW
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(descriptor)
    os.rename(made, path)


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None  # deleted meanwhile, or an agent was killed while it wrote
    wanted = {"key", "path", "netns", "state", "pod", "network"}
    return found if isinstance(found, dict) and wanted <= found.keys() else None
