"""Send one packet of a path as the right user, and hear where it came up. In a child process: setuid(2) is for good."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from dataclasses import dataclass

from interceptor.errors import InterceptorError
from interceptor.probe.neighbour import Neighbour
from interceptor.probe.paths import Path
from interceptor.values import Family, Proto

# On one host an answer takes microseconds; a dropped SYN is tried again after 1 s (RFC 6298), so 3 s see one retry.
TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Answer:
    """`heard` is the original destination that came back; None when nothing did, and `error` says how that showed."""

    heard: str | None = None
    error: str = ""
    refused_privilege: bool = False
    no_route: bool = False
    unable: str = ""  # why it could not be sent as it must be


def send(path: Path, beside: Neighbour | None) -> Answer:
    """Send `path`'s packet, from the neighbour when it must come in from outside, and wait for the answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            answer = _in_child(path, beside)
            os.write(writing, json.dumps(dataclasses.astuple(answer)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return Answer(*json.loads(told)) if told else Answer(error="the probing process died")


def _in_child(path: Path, beside: Neighbour | None) -> Answer:
    try:
        _join(path.cgroup)
    except (OSError, InterceptorError) as error:
        return Answer(unable=f"joining cgroup {path.cgroup}: {error}")
    try:
        if path.needs_neighbour and beside is not None:
            beside.enter()
        else:
            _become(path.uid, path.gid)
    except PermissionError:
        return Answer(refused_privilege=True)
    family = socket.AF_INET if path.family is Family.V4 else socket.AF_INET6
    # What is captured when it is connected needs no route.
    if path.cgroup is None and not _has_route(family, path):
        return Answer(no_route=True)
    kind = socket.SOCK_STREAM if path.proto is Proto.TCP else socket.SOCK_DGRAM
    try:
        with socket.socket(family, kind) as sending:
            sending.settimeout(TIMEOUT_S)
            sending.connect((str(path.destination), path.port))
            if path.proto is Proto.UDP:
                sending.send(path.expected.encode())
            return Answer(_told(sending))
    except OSError as error:
        return Answer(error=error.strerror or str(error))


def _has_route(family: socket.AddressFamily, path: Path) -> bool:
    """Whether the packet would be sent at all. Connecting a datagram socket asks the routing table and sends nothing.

    An unreachable network that shows only later was told by some router: then the packet did leave, uncaptured.
    """
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((str(path.destination), path.port))
        except OSError:
            return False
    return True


def _join(cgroup: str | None) -> None:
    """Be of the processes whose connections are captured."""
    if cgroup is None:
        return
    from interceptor.backends import cgroups

    with open(os.path.join(cgroups.directory(cgroup, "--capture-cgroup"), "cgroup.procs"), "w", encoding="ascii") as processes:
        processes.write("0")


def _become(uid: int, gid: int) -> None:
    if (uid, gid) == (os.getuid(), os.getgid()):
        return
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def _told(sending: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n") and len(line) < 4096:
        piece = sending.recv(4096)
        if not piece:
            break
        line += piece
    try:
        return str(json.loads(line)["original_dst"])
    except (ValueError, KeyError, TypeError):
        return "unknown: whoever answered is not interceptor"
