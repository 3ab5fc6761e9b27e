"""The demo's programs: a real HTTP server, a real client, and `interceptor proxy`, each a process in a pod."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from interceptor import launch, netns
from interceptor.backends import process
from interceptor.config import FIELDS, SWITCH, Config, Field
from interceptor.demo.pods import Pod
from interceptor.errors import InterceptorError, ProxyError

LISTENING = "0A"  # TCP_LISTEN, include/net/tcp_states.h, as /proc/net/tcp shows it
START_TIMEOUT_S = 10.0  # Python starts in 0.1 s; this is for a machine under load
REQUEST_TIMEOUT_S = 5
Program: TypeAlias = Callable[[], None]
SERVER_NAME, PYTHON_CLIENT = "httpd", "http-client"
BODY = b"hello from the server pod\n"


@dataclass(frozen=True, slots=True)
class User:
    """Whom a program runs as."""

    uid: int
    gid: int


def start(pod: Pod, user: User, program: Program) -> int:
    """Run `program` in `pod` as `user`, in a process of its own that dies with this one; its pid."""
    parent = os.getpid()

    def child() -> None:
        _forget_handlers()
        netns.enter_for_good(pod.path)
        launch.become(user.uid, user.gid)
        launch.die_with(parent)
        program()

    return launch.spawn(child)


def _forget_handlers() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # A terminal's Ctrl-C reaches this process too; the demo ends it in its own order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def proxy(config: Config, flows_fd: int, talk_fd: int) -> Program:
    """`interceptor proxy` for `config`, its flow records going to `flows_fd`, what else it says to `talk_fd`."""
    # All options as flags: nothing of the caller's environment may change what both halves agree on.
    options = [text for row in FIELDS for text in _flag(row, getattr(config, row.name))]

    def become_proxy() -> None:
        os.dup2(flows_fd, 1)
        os.dup2(talk_fd, 2)
        launch.exec_command([sys.executable, "-m", "interceptor", "proxy", "--workers=1", *options])

    return become_proxy


def _flag(row: Field, value: object) -> tuple[str, ...]:
    if row.kind is SWITCH:
        return (row.flag if value else row.flag.replace("--", "--no-", 1),)
    return (f"{row.flag}={row.kind.show(value)}",)


def serve_http(ports: tuple[int, ...]) -> Program:
    """A program that answers GET on `ports`, v4 and v6, for ever."""
    # Imported here, as root: the program's user may not be allowed to read where Python is installed.
    import http.server
    import socketserver
    import threading

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - http.server's name
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing: the table does."""

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6  # takes IPv4 too: IPV6_V6ONLY is off by default

        def server_bind(self) -> None:
            # Not HTTPServer's: it asks the DNS, which is not there, for its own name.
            socketserver.TCPServer.server_bind(self)

    def serve() -> None:
        _name_process(SERVER_NAME)
        servers = [Server(("::", port), Hello) for port in ports]
        for server in servers[1:]:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        servers[0].serve_forever()

    return serve


def request(url: str) -> Program:
    """A program that fetches `url`: curl when it is installed, else Python."""
    curl = process.find("curl")
    if curl is None:
        return _fetch(url)
    # -q and --noproxy: the user's own settings must not lead it elsewhere.
    argv = f"{curl} -q -sSf --noproxy * --max-time {REQUEST_TIMEOUT_S} -o /dev/null {url}".split()
    return lambda: launch.exec_command(argv)


def client_name() -> str:
    """What request() runs."""
    return "curl" if process.find("curl") else PYTHON_CLIENT


def _fetch(url: str) -> Program:
    import encodings.idna  # noqa: F401 - sockets import it when they are given a name
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch() -> None:
        _name_process(PYTHON_CLIENT)
        with opener.open(url, timeout=REQUEST_TIMEOUT_S) as answer:
            answer.read()

    return fetch


def _name_process(name: str) -> None:
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def wait_until_listening(pid: int, ports: frozenset[int], what: str) -> None:
    """Return once process `pid`'s namespace listens on all `ports`. Raises ProxyError when it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ports <= _listening(pid):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            raise ProxyError(f"{what} ended before it listened")
        if time.monotonic() > deadline:
            raise ProxyError(f"{what} does not listen on {sorted(ports - _listening(pid))} after {START_TIMEOUT_S:g} s")
        time.sleep(0.01)


def _listening(pid: int) -> set[int]:
    found: set[int] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
            for line in list(file)[1:]:
                fields = line.split()
                if fields[3] == LISTENING:
                    found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def finished(pid: int, what: str) -> None:
    """Wait for a client. Raises InterceptorError when it failed."""
    status = os.waitpid(pid, 0)[1]
    if code := launch.exit_code(status):
        raise InterceptorError(f"{what}: the client ended with exit code {code}; see above")
