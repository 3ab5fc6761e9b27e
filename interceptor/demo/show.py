"""The demo from end to end: two pods, rules and a proxy in both, requests, the flows that were seen, all of it gone again."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import select
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from interceptor import capture, facts, launch, netns
from interceptor.config import Backend, Config
from interceptor.demo import pods, programs
from interceptor.demo.interrupt import undisturbed
from interceptor.demo.pods import Pod
from interceptor.demo.programs import User
from interceptor.errors import NetnsError, ProxyError
from interceptor.proxy.flows import rfc3339
from interceptor.table import Place, Seen, see
from interceptor.values import PortRange

PORT, EXCLUDED_PORT = 8080, 9090
CLIENT_USER, SERVER_USER = User(1000, 1000), User(1001, 1001)
ROOT = User(0, 0)  # the proxy starts as root and becomes --proxy-uid by itself
FLOWS_TIMEOUT_S = 5.0  # a flow is reported when its connection has closed: milliseconds
GRACE_S = 2.0  # of a proxy that drains


@dataclass(frozen=True, slots=True)
class Expected:
    """One flow that must be seen."""

    pod: str
    direction: Literal["outbound", "inbound"]
    destination: str

    def __str__(self) -> str:
        return f"{self.direction} to {self.destination} in the {self.pod} pod"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was expected and what came."""

    flows: tuple[Seen, ...]
    expected: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Every expected flow was seen, and none went to the proxy that should not have."""
        return not self.missing and not self.unexpected


@dataclass(slots=True)
class _Captured:
    """A pod under capture: the plan that stands there, and its proxy."""

    pod: Pod
    report: capture.Report
    place: Place
    flows_fd: int
    talk_fd: int
    proxy: int
    unread: bytes = b""

    def talk(self) -> str:
        """What the proxy has said on stderr."""
        return os.pread(self.talk_fd, 1 << 16, 0).decode(errors="replace").strip()


@dataclass(frozen=True, slots=True)
class _Program:
    """One that the demo started, and the time it ran: a proxy under its own uid may not look into another user's process."""

    pid: int
    command: str
    uid: int
    since: float
    until: float = math.inf

    def owns(self, record: dict[str, Any]) -> bool:
        """Whether the flow is this program's: requests are made one after the other, so time and uid tell."""
        start = datetime.fromisoformat(record["time"]).timestamp()
        # Records have milliseconds.
        return record["uid"] == self.uid and self.since - 0.001 <= start <= self.until


@dataclass(slots=True)
class Demo:
    """One demonstration: `build`, `make_requests`, `verdict`; `tear_down` at the end, whatever happened."""

    backend: Backend
    captured: list[_Captured] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    started: list[_Program] = field(default_factory=list)
    direct: list[Seen] = field(default_factory=list)
    expected: Counter[Expected] = field(default_factory=Counter)
    client: Pod = field(init=False)
    server: Pod = field(init=False)

    def __post_init__(self) -> None:
        # Addresses for documentation (RFC 5737, RFC 3849): nobody's, and the namespaces are joined to nothing else.
        self.client, self.server = (
            Pod(
                f"itc-demo-{os.getpid()}-{role}",
                role,
                ipaddress.IPv4Interface(f"192.0.2.{number}/24"),
                ipaddress.IPv6Interface(f"2001:db8::{number}/64"),
            )
            for number, role in ((1, "client"), (2, "server"))
        )

    @property
    def config(self) -> Config:
        """What both pods are captured with."""
        excluded = (PortRange(EXCLUDED_PORT, EXCLUDED_PORT),)
        return Config(backend=self.backend, exclude_outbound_ports=excluded, exclude_inbound_ports=excluded)

    def build(self) -> None:
        """Both pods, their rules, their proxies, and the server. Raises InterceptorError."""
        if os.geteuid() != 0:
            raise NetnsError("the demo makes network namespaces and runs programs under other uids: run it as root (sudo)")
        for pod in (self.client, self.server):
            pods.create(pod)
        pods.connect(self.client, self.server)
        for pod in (self.client, self.server):
            self.captured.append(self._capture(pod))
        started = time.time()
        server = self._start(self.server, SERVER_USER, programs.serve_http((PORT, EXCLUDED_PORT)))
        self.started.append(_Program(server, programs.SERVER_NAME, SERVER_USER.uid, started))
        config = self.config
        for each in self.captured:
            wanted = frozenset((config.outbound_port, config.inbound_port))
            try:
                programs.wait_until_listening(each.proxy, wanted, f"the proxy of the {each.pod.role} pod")
            except ProxyError as error:
                raise ProxyError(f"{error}: {each.talk()}") from error
        programs.wait_until_listening(server, frozenset((PORT, EXCLUDED_PORT)), "the HTTP server")

    def _capture(self, pod: Pod) -> _Captured:
        report = capture.enable(self.config, netns=pod.path)
        with netns.entered(pod.path):
            place = Place(report.plan, pods.INTERFACE, facts.local_addresses())
        ours, theirs = os.pipe()
        talk = os.memfd_create("talk")  # shown only when something goes wrong
        proxy = self._start(pod, ROOT, programs.proxy(self.config, theirs, talk))
        os.close(theirs)
        return _Captured(pod, report, place, ours, talk, proxy)

    def _start(self, pod: Pod, user: User, program: programs.Program) -> int:
        with undisturbed():
            pid = programs.start(pod, user, program)
            self.pids.append(pid)
        return pid

    def make_requests(self, count: int) -> None:
        """One request past the proxy, then `count` over each IP family."""
        hosts = (str(self.server.v4.ip), f"[{self.server.v6.ip}]")
        self._request_direct(f"{hosts[0]}:{EXCLUDED_PORT}")
        for host in hosts * count:
            self._request(f"{host}:{PORT}")
            self.expected[Expected("client", "outbound", f"{host}:{PORT}")] += 1
            self.expected[Expected("server", "inbound", f"{host}:{PORT}")] += 1

    def _request(self, destination: str) -> _Program:
        url = f"http://{destination}/"
        started = time.time()
        pid = self._start(self.client, CLIENT_USER, programs.request(url))
        programs.finished(pid, f"GET {url} from the {self.client.name} namespace")
        self.pids.remove(pid)
        self.started.append(_Program(pid, programs.client_name(), CLIENT_USER.uid, started, time.time()))
        return self.started[-1]

    def _request_direct(self, destination: str) -> None:
        program = self._request(destination)
        record: dict[str, Any] = {
            "time": rfc3339(program.since),
            "protocol": "tcp",
            "direction": "outbound",
            "client": f"{self.client.v4.ip}:0",
            "original_dst": destination,
            "uid": program.uid,
            "pid": program.pid,
            "command": program.command,
        }
        self.direct.append(see(record, self.captured[0].place, self.client.role))

    def watch(self, timeout_s: float) -> Iterator[Seen]:
        """The flows that the proxies report, for `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        waiting = {each.flows_fd: each for each in self.captured}
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for descriptor, _events in poll.poll(min(left_s, 3600) * 1000):
                read = os.read(descriptor, 1 << 16)
                if not read:
                    poll.unregister(descriptor)
                    del waiting[descriptor]
                    continue
                yield from self._split(waiting[descriptor], read)

    def _split(self, source: _Captured, read: bytes) -> Iterator[Seen]:
        *complete, source.unread = (source.unread + read).split(b"\n")
        for line in complete:
            record = json.loads(line)
            if record["pid"] is None and (owner := next((each for each in self.started if each.owns(record)), None)):
                record |= {"pid": owner.pid, "command": owner.command}
            yield see(record, source.place, source.pod.role)

    def verdict(self) -> Verdict:
        """Wait until every expected flow has been reported, or too long."""
        seen = list(self.direct)
        left = Counter(self.expected)
        unexpected = [str(one.record["original_dst"]) for one in self.direct if one.rule.fate != "direct"]
        for one in self.watch(FLOWS_TIMEOUT_S):
            seen.append(one)
            record = one.record
            what = Expected(one.pod, record["direction"], str(record["original_dst"]))
            if left[what] and record["reason"] == "closed" and one.rule.fate == "captured":
                left[what] -= 1
            else:
                unexpected.append(f"{what} ({record['reason']})")
            if not +left:
                break
        seen.sort(key=lambda one: str(one.record.get("time") or ""))
        return Verdict(tuple(seen), self.expected.total(), tuple(map(str, left.elements())), tuple(unexpected))

    def tear_down(self) -> None:
        """End every process, remove both namespaces. Never fails half-way for what was not built."""
        launch.end(self.pids, grace_s=GRACE_S)
        for each in self.captured:
            os.close(each.flows_fd)
            os.close(each.talk_fd)
        for pod in (self.client, self.server):
            pods.remove(pod)
