"""Two network namespaces with a veth between them, and a proxy process in one. Rules are written by hand here, on purpose:

the proxy is tested against what the kernel does, not against what our renderers write.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from interceptor import netns

DEADLINE_S = 10.0
PROXY_UID = 1337
V4 = {"pod": "10.77.0.1", "far": "10.77.0.2"}
V6 = {"pod": "fd77::1", "far": "fd77::2"}
OUTBOUND, INBOUND, DNS = 15001, 15006, 15053
APP_PORT, PROBE_PORT = 8080, 15002

REDIRECT_RULES = f"""
table inet px {{
  chain out {{
    type nat hook output priority -100;
    meta skuid {PROXY_UID} return
    ip daddr 127.0.0.0/8 return
    ip6 daddr ::1 return
    udp dport 53 redirect to :{DNS}
    tcp dport 53 redirect to :{DNS}
    meta l4proto tcp redirect to :{OUTBOUND}
  }}
  chain in {{
    type nat hook prerouting priority -100;
    tcp dport {{ {APP_PORT}, {PROBE_PORT} }} redirect to :{INBOUND}
  }}
}}
"""
TPROXY_RULES = f"""
table inet px {{
  chain in {{
    type filter hook prerouting priority -150;
    iifname "lo" meta mark 2 udp dport {{ 9000, 9001 }} tproxy to :{OUTBOUND} accept
    iifname "lo" meta mark 2 tcp dport 9002 tproxy to :{OUTBOUND} accept
    iifname "lo" return
    meta l4proto tcp socket transparent 1 meta mark set 1 accept
    tcp dport {{ {APP_PORT}, {OUTBOUND} }} tproxy to :{INBOUND} meta mark set 1 accept
    udp dport {APP_PORT} tproxy to :{INBOUND} meta mark set 1 accept
  }}
  chain out {{
    type route hook output priority -150;
    meta skuid {PROXY_UID} ct mark 1 meta mark set 1 return
    meta skuid {PROXY_UID} return
    ct direction reply ct mark 1 meta mark set 1 return
    ct direction reply return
    udp dport {{ 9000, 9001 }} meta mark set 2
    tcp dport 9002 meta mark set 2
  }}
}}
"""
# The divert back of original-source connections: what the proxy marks (SO_MARK 3) has its answers delivered locally.
ORIGINAL_SOURCE_RULES = """
table inet px_source {
  chain out {
    type filter hook output priority -140;
    meta mark 3 ct mark set 3
  }
  chain answers {
    type route hook output priority -140;
    ct mark 3 ct direction reply meta mark set 1
  }
}
"""


def run(*words: str, feed: str | None = None) -> str:
    """A command that must succeed; its output."""
    return subprocess.run(words, input=feed, text=True, check=True, capture_output=True).stdout


@dataclass
class Pods:
    """`pod` has the application and the proxy; `far` is everybody else."""

    pod: str
    far: str

    def rules(self, text: str) -> None:
        """Load nft rules in the pod."""
        run("ip", "netns", "exec", self.pod, "nft", "-f", "-", feed=text)

    def policy_routes(self) -> None:
        """Deliver packets marked 1 or 2 locally, as TPROXY needs."""
        for family in ("-4", "-6"):
            for mark in ("1", "2"):
                run("ip", "-n", self.pod, family, "rule", "add", "fwmark", mark, "lookup", "133", "priority", f"10{mark}")
            run("ip", "-n", self.pod, family, "route", "add", "local", "default", "dev", "lo", "table", "133")


@contextmanager
def pods(name: str) -> Iterator[Pods]:
    """Both namespaces, with addresses of both families; gone after the block."""
    made = Pods(f"itc-px-{os.getpid()}-{name}-pod", f"itc-px-{os.getpid()}-{name}-far")
    try:
        for each in (made.pod, made.far):
            run("ip", "netns", "add", each)
            run("ip", "-n", each, "link", "set", "lo", "up")
        run("ip", "-n", made.pod, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", made.far)
        for role, each in (("pod", made.pod), ("far", made.far)):
            run("ip", "-n", each, "addr", "add", f"{V4[role]}/24", "dev", "eth0")
            run("ip", "-n", each, "addr", "add", f"{V6[role]}/64", "dev", "eth0", "nodad")
            run("ip", "-n", each, "link", "set", "eth0", "up")
        run("ip", "-n", made.pod, "addr", "add", "::6/128", "dev", "lo")
        run("ip", "-n", made.pod, "route", "add", "default", "via", V4["far"])
        yield made
    finally:
        for each in (made.pod, made.far):
            subprocess.run(["ip", "netns", "del", each], check=False, capture_output=True)


class ProxyProcess:
    """The proxy, running in a namespace; its flows as they come."""

    def __init__(self, where: str, settings: dict[str, Any]) -> None:
        program = [sys.executable, "-m", "tests.proxy.serve", json.dumps(settings)]
        self.process = subprocess.Popen(["ip", "netns", "exec", where, *program], stdout=subprocess.PIPE, text=True)
        self.flows: list[dict[str, Any]] = []
        self.counters: dict[str, Any] = {}
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def flow(self, wanted: Callable[[dict[str, Any]], bool] = lambda _flow: True) -> dict[str, Any]:
        """The first flow that `wanted` takes, once it is there."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for each in self.flows:
                if wanted(each):
                    return each
            time.sleep(0.005)
        raise AssertionError(f"no such flow among {self.flows}")

    def stop(self) -> int:
        """Ask it to end with SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self._reader.join(DEADLINE_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "counters" in answer:
                self.counters = answer["counters"]
            else:
                self.flows.append(answer)
        self.process.stdout.close()


@contextmanager
def proxy(where: str, **settings: Any) -> Iterator[ProxyProcess]:
    """A proxy in namespace `where`; stopped after the block."""
    started = ProxyProcess(where, settings)
    try:
        yield started
    finally:
        started.stop()


def listen(where: str, ip: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A server's socket inside namespace `where`."""
    with netns.entered(f"/run/netns/{where}"):
        sock = socket.socket(family(ip), kind)
    sock.settimeout(DEADLINE_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((ip, port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def client(where: str, ip: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A client's socket inside namespace `where`, connected."""
    with netns.entered(f"/run/netns/{where}"):
        sock = socket.socket(family(ip), kind)
    sock.settimeout(DEADLINE_S)
    try:
        sock.connect((ip, port))
    except OSError:
        sock.close()
        raise
    return sock


def is_reset(where: str, ip: str, port: int) -> bool:
    """Whether a connection is accepted and then reset. The reset may come before connect() has returned."""
    try:
        with client(where, ip, port) as sock:
            sock.recv(1)
    except ConnectionResetError:
        return True
    return False


def family(ip: str) -> socket.AddressFamily:
    """The family of an address."""
    return socket.AF_INET6 if ":" in ip else socket.AF_INET
