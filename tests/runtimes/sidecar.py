"""The real proxy beside a container: in its network namespace, as uid 1337. And clients in and outside of it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from interceptor.netns import entered
from tests.runtimes.node import DEADLINE_S, Node

ADMIN_PORT = 15020
CONNECT_S = 5.0


@contextmanager
def proxying(node: Node, pid: int, *options: str) -> Iterator[list[dict[str, Any]]]:
    """`interceptor proxy` runs in the namespace of `pid`; after the block the list holds its flow records."""
    argv = node.inside("nsenter", "-t", str(pid), "-n", sys.executable, "-m", "interceptor", "proxy", *options)
    flows: list[dict[str, Any]] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as proxy:
        try:
            node.until(
                lambda: proxy.poll() is not None or is_open(node.netns_of(pid), "127.0.0.1", ADMIN_PORT), "a proxy that listens"
            )
            yield flows
        finally:
            node.end(proxy)
            stdout, stderr = proxy.communicate(timeout=DEADLINE_S)
            assert proxy.returncode in (0, 128 + signal.SIGTERM), stderr
        flows += [json.loads(line) for line in stdout.splitlines()]


def is_open(netns: str, address: str, port: int) -> bool:
    """Whether something listens there, seen from a namespace."""
    try:
        with connect(netns, address, port):
            return True
    except OSError:
        return False


def page(netns: str, address: str, port: int) -> str:
    """What a web server answers to a client in a namespace: the body. Raises OSError."""
    with connect(netns, address, port) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while part := client.recv(4096):
            answer += part
    return answer.decode().partition("\r\n\r\n")[2]


def connect(netns: str, address: str, port: int) -> socket.socket:
    """A connection from a namespace. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(netns):
        client = socket.socket(family)
    client.settimeout(CONNECT_S)
    try:
        client.connect((address, port))
    except OSError:
        client.close()
        raise
    return client


def addresses(node: Node, pid: int) -> dict[str, str]:
    """A pod's own addresses, by family."""
    shown = json.loads(node.run("nsenter", "-t", str(pid), "-n", "ip", "-json", "addr", "show", "dev", "eth0"))
    found = [each for each in shown[0]["addr_info"] if each["scope"] == "global"]
    return {"v6" if each["family"] == "inet6" else "v4": each["local"] for each in found}
