"""`interceptor run`: real commands on a machine of our own (machine.py), as root and as nobody."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.machine import (
    HTTP_PORT,
    INTERCEPTOR,
    NAME,
    UNPRIVILEGED,
    WORLD_V4,
    WORLD_V6,
    Machine,
    kernel_state,
    processes,
    sh,
    wait_for,
)

pytestmark = [pytest.mark.netns, pytest.mark.slow]

V4, V6 = f"{WORLD_V4}:{HTTP_PORT}", f"[{WORLD_V6}]:{HTTP_PORT}"
USERS = [pytest.param((), id="root"), pytest.param(UNPRIVILEGED, id="nobody")]
# A DNS query by hand, so that TCP can be chosen: prints the answer's length.
ASK = """
import socket, struct, sys
query = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"\\3www\\4test\\0" + struct.pack("!HH", 1, 1)
kind, server = sys.argv[1:]
sock = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET,
                     socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
sock.settimeout(5)
sock.connect((server, 53))
sock.send((struct.pack("!H", len(query)) if kind == "tcp" else b"") + query)
answer = sock.recv(512)
print(socket.inet_ntoa(answer[-4:]))
"""


def flows(machine: Machine, *argv: str, user: tuple[str, ...] = ()) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Run a command; its result and its flows."""
    done = machine.interceptor("run", "--json", "--", *argv, user=user)
    return done, [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


@pytest.mark.default_relay
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("destination", [pytest.param(V4, id="v4"), pytest.param(V6, id="v6")])
def test_a_connection_is_captured_and_made_from_the_host(machine: Machine, user: tuple[str, ...], destination: str) -> None:
    done, seen = flows(machine, "curl", "-sS", f"http://{destination}/1000", user=user)
    assert (done.returncode, done.stdout) == (0, "x" * 1000)
    assert [flow["original_dst"] for flow in seen] == [destination]
    (flow,) = seen
    assert flow["uid"] == (65534 if user else 0)
    assert flow["command"].startswith("curl -sS")
    assert flow["bytes_received"] > 1000
    assert (flow["fate"], flow["option"]) == ("captured", "--outbound redirect")


@pytest.mark.parametrize("user", USERS)
def test_a_name_is_resolved_by_the_hosts_resolver(machine: Machine, user: tuple[str, ...]) -> None:
    done, seen = flows(machine, "curl", "-sS", f"http://{NAME}:{HTTP_PORT}/", user=user)
    assert (done.returncode, done.stdout) == (0, "xxxxx")
    queries = [flow for flow in seen if flow["direction"] == "dns"]
    assert queries
    assert {(flow["protocol"], flow["option"], flow["reason"]) for flow in queries} <= {
        ("udp", "--dns", "answered"),
        ("udp", "--dns", "cached"),
    }
    assert {flow["dns"]["name"] for flow in queries} == {NAME}
    assert [(flow["direction"], flow["dns_name"]) for flow in seen if flow not in queries] == [("outbound", NAME)]


@pytest.mark.parametrize("server", [WORLD_V4, WORLD_V6, "127.0.0.53"])
@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_dns_to_any_server_is_answered(machine: Machine, kind: str, server: str) -> None:
    done, _ = flows(machine, sys.executable, "-c", ASK, kind, server)
    assert (done.returncode, done.stdout) == (0, f"{WORLD_V4}\n"), done.stderr


@pytest.mark.default_relay
def test_a_large_body_arrives_whole_both_ways(machine: Machine) -> None:
    body = machine.directory / "body"
    body.write_bytes(os.urandom(8 << 20))
    done, seen = flows(machine, "curl", "-sS", "--data-binary", f"@{body}", f"http://{V4}/")
    assert (done.returncode, done.stdout) == (0, str(8 << 20))
    assert seen[0]["bytes_sent"] > 8 << 20
    done, seen = flows(machine, "curl", "-sS", f"http://{V6}/{8 << 20}")
    assert (done.returncode, len(done.stdout)) == (0, 8 << 20)


def test_last_bytes_of_a_command_that_does_not_wait_arrive(machine: Machine) -> None:
    script = f"import socket; socket.create_connection(('{WORLD_V4}', {HTTP_PORT})).sendall(b'GET /')"
    for _ in range(10):
        done, seen = flows(machine, sys.executable, "-c", script)
        assert (done.returncode, [flow["bytes_sent"] for flow in seen]) == (0, [5])


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        pytest.param(["true"], 0, id="success"),
        pytest.param(["sh", "-c", "exit 42"], 42, id="its own"),
        pytest.param(["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, id="killed"),
        pytest.param(["no-such-command"], 127, id="not found"),
        pytest.param([""], 127, id="empty"),
        pytest.param(["/etc/passwd"], 126, id="not executable"),
    ],
)
@pytest.mark.parametrize("user", USERS)
def test_exit_code_is_the_commands(machine: Machine, argv: list[str], code: int, user: tuple[str, ...]) -> None:
    assert machine.interceptor("run", "--", *argv, user=user).returncode == code


def test_a_command_that_cannot_run_is_named(machine: Machine) -> None:
    done = machine.interceptor("run", "--", "no-such-command")
    assert done.stderr == "interceptor: no-such-command: command not found\n"


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_run_is_told_in_json_when_asked(machine: Machine, command: str, code: int) -> None:
    done = machine.interceptor("run", "--json", "--", command)
    assert (done.returncode, done.stderr) == (code, "")
    assert json.loads(done.stdout)["error"]["exit_code"] == code


@pytest.mark.parametrize("by", ["name", "path", "pid"])
def test_connections_are_made_from_another_namespace_when_asked(machine: Machine, by: str) -> None:
    # Called in the machine's own namespace, from where there is no way to the world.
    path = f"/run/netns/{machine.host}"
    sleeper = subprocess.Popen(["ip", "netns", "exec", machine.host, "sleep", "60"])
    try:
        wait_for(lambda: Path(f"/proc/{sleeper.pid}/comm").read_text() == "sleep\n", "a process in the namespace")
        before = kernel_state(None), kernel_state(machine.host)
        where = {"name": machine.host, "path": path, "pid": str(sleeper.pid)}[by]
        # A pid's resolv.conf is that process's: `ip netns exec` gives the namespace's own.
        script = f"readlink /proc/self/ns/net; curl -sS http://{V4}/; curl -sS http://{NAME}:{HTTP_PORT}/"
        argv = [*INTERCEPTOR, "run", "--json", "--netns", where, "--", "sh", "-c", script]
        done = subprocess.run(argv, text=True, capture_output=True, timeout=20, check=False)
        inside, answer = done.stdout.splitlines()
        assert (done.returncode, answer) == (0, "xxxxxxxxxx"), done.stderr
        assert inside not in (os.readlink("/proc/self/ns/net"), os.readlink(f"/proc/{sleeper.pid}/ns/net"))
        seen = [json.loads(line) for line in done.stderr.splitlines()]
        assert V4 in [flow["original_dst"] for flow in seen]
        assert "dns" in [flow["direction"] for flow in seen]
        assert (kernel_state(None), kernel_state(machine.host)) == before
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("wanted", ["no-such-netns", "/etc/passwd"])
def test_a_namespace_that_is_none_is_refused_and_nothing_runs(machine: Machine, wanted: str) -> None:
    done = machine.interceptor("run", "--netns", wanted, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (4, "")
    assert wanted in done.stderr


def test_stdin_stdout_and_the_environment_are_the_callers(machine: Machine) -> None:
    argv = ("sh", "-c", "cat; echo $HOME; ls -l /proc/self/fd | wc -l")
    assert machine.interceptor("run", "--", *argv, stdin="line\n").stdout == sh(*argv, stdin="line\n")


def test_options_after_the_command_are_the_commands(machine: Machine) -> None:
    done = machine.interceptor("run", "echo", "--json", "--help")
    assert (done.returncode, done.stdout) == (0, "--json --help\n")


def _started(machine: Machine, script: str, user: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        machine.command("run", "--", "sh", "-c", script, user=user), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
@pytest.mark.parametrize("user", USERS)
def test_a_signal_reaches_the_command(machine: Machine, number: signal.Signals, user: tuple[str, ...]) -> None:
    trap = f"trap 'echo got; exit 9' {number.name.removeprefix('SIG')}; echo ready; while :; do sleep 0.05; done"
    process = _started(machine, trap, user)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (9, "got\n")


def test_a_signal_that_kills_the_command_gives_128_and_its_number(machine: Machine) -> None:
    process = _started(machine, "echo ready; exec sleep 60")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_at_the_terminal_reaches_the_command_once(machine: Machine) -> None:
    # A terminal of its own, as a shell's user has; the count shows whether the signal came twice.
    count = "import signal, time; n = []; signal.signal(2, lambda *_: n.append(1)); print('ready', flush=True); "
    count += "end = time.monotonic() + 1\nwhile time.monotonic() < end: time.sleep(0.01)\nprint('times', len(n))"
    master, slave = os.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *machine.command("run", "--", sys.executable, "-c", count)],
        stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(master, 4096)
    os.write(master, b"\x03")
    while not re.search(rb"times \d", shown):
        shown += os.read(master, 4096)
    assert process.wait(timeout=20) == 0
    os.close(master)
    assert b"times 1" in shown


@pytest.mark.default_relay
@pytest.mark.parametrize("user", USERS)
def test_nothing_is_left(machine: Machine, user: tuple[str, ...]) -> None:
    before = kernel_state(None), kernel_state(machine.host)
    marker = f"left-by-{machine.host}"
    sleeper = f"{sys.executable} -c 'import time; time.sleep(60)' {marker}"
    script = f"curl -s http://{V4}/; setsid {sleeper} & {sleeper} & exit 5"
    assert machine.interceptor("run", "--", "sh", "-c", script, user=user).returncode == 5
    assert processes(marker) == []
    assert (kernel_state(None), kernel_state(machine.host)) == before


@pytest.mark.default_relay
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_kill(machine: Machine, number: signal.Signals) -> None:
    before = kernel_state(None), kernel_state(machine.host)
    marker = f"killed-by-{machine.host}"
    process = _started(machine, f"echo ready; exec {sys.executable} -c 'import time; time.sleep(60)' {marker}")
    assert processes(marker)
    process.send_signal(number)
    process.communicate(timeout=20)
    wait_for(lambda: not processes(marker), "the end of the command")
    assert (kernel_state(None), kernel_state(machine.host)) == before


def test_the_table_says_who_where_and_why(machine: Machine) -> None:
    done = machine.interceptor("run", "--", "curl", "-s", f"http://{V6}/2000")
    heading, row = done.stderr.splitlines()
    assert heading.split() == ["TIME", "WHO", "UID", "DESTINATION", "RULE", "SENT", "RECV", "TOOK"]
    assert re.search(r"curl\[\d+\] +0 ", row)
    assert V6 in row
    assert "--outbound redirect" in row
    assert "2.1 KiB" in row
    assert len(row) <= 120


def test_dns_stands_in_the_table(machine: Machine) -> None:
    done = machine.interceptor("run", "--", "curl", "-s", "-4", f"http://{NAME}:{HTTP_PORT}/")
    _, query, *_ = done.stderr.splitlines()
    assert "a DNS server" in query
    assert "--dns" in query


def test_udp_is_captured_when_asked(machine: Machine) -> None:
    # The world's DNS server, asked past the DNS capture: any other UDP looks the same.
    args = ("run", "--json", "--udp", "tproxy", "--dns", "off", "--", sys.executable, "-c", ASK, "udp", WORLD_V6)
    done = machine.interceptor(*args)
    assert (done.returncode, done.stdout) == (0, f"{WORLD_V4}\n"), done.stderr
    (flow,) = (json.loads(line) for line in done.stderr.splitlines())
    assert (flow["protocol"], flow["original_dst"], flow["fate"]) == ("udp", f"[{WORLD_V6}]:53", "captured")


def test_udp_without_root_is_refused(machine: Machine) -> None:
    done = machine.interceptor("run", "--udp", "tproxy", "--", "true", user=UNPRIVILEGED)
    assert done.returncode == 6
    assert "--udp" in done.stderr


def test_orphans_of_the_command_are_waited_for(machine: Machine) -> None:
    # A zombie answers kill -0: whoever stops a daemon would wait for it in vain.
    script = "pid=$(sh -c 'sleep 0.1 >&2 & echo $!'); sleep 0.5; ! kill -0 $pid"
    assert machine.interceptor("run", "--", "sh", "-c", script).returncode == 0


@pytest.mark.parametrize(("options", "stderr"), [("", "/dev/full"), ("--json", "/dev/full"), ("--flows /dev/full", "&1")])
def test_flows_that_nobody_takes_leave_the_exit_code_alone(machine: Machine, options: str, stderr: str) -> None:
    command = " ".join(machine.command("run", *options.split(), "--", "sh", "-c", f"'curl -so /dev/null http://{V4}/; exit 5'"))
    assert sh("sh", "-c", f"{command} 2>{stderr}; echo $?").splitlines()[-1] == "5"


def test_a_file_for_flows_that_cannot_be_written_is_refused_before_anything_runs(machine: Machine) -> None:
    done = machine.interceptor("run", "--flows", "/nowhere/flows", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")


def test_flows_go_to_a_file_when_asked(machine: Machine) -> None:
    file = machine.directory / "flows"
    done = machine.interceptor("run", "--flows", str(file), "--", "curl", "-s", f"http://{V4}/")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["original_dst"] for line in file.read_text().splitlines()] == [V4]


def test_a_dead_destination_fails_for_the_command_too(machine: Machine) -> None:
    done, seen = flows(machine, "curl", "-s", f"http://{WORLD_V4}:9/")
    assert done.returncode != 0
    assert [(flow["reason"], flow["original_dst"]) for flow in seen] == [("connect_failed", f"{WORLD_V4}:9")]


def test_where_the_host_has_no_route_the_command_has_none(machine: Machine) -> None:
    done, seen = flows(machine, "curl", "-sS", "http://192.0.2.77/")
    assert (done.returncode, seen) == (7, [])


def test_the_hosts_loopback_is_out_of_reach(machine: Machine) -> None:
    done, seen = flows(machine, "curl", "-sS", "http://127.0.0.1:8000/")
    assert (done.returncode, seen) == (7, [])


def test_the_proxys_own_port_is_refused(machine: Machine) -> None:
    done, seen = flows(machine, "curl", "-sS", "http://127.0.0.1:15001/")
    assert done.returncode != 0
    assert [flow["reason"] for flow in seen] == ["refused_direct_dial"]


@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy"])
def test_every_backend_captures(machine: Machine, backend: str) -> None:
    done = machine.interceptor("run", "--json", "--backend", backend, "--", "curl", "-s", f"http://{V6}/")
    assert (done.returncode, done.stdout) == (0, "xxxxx")
    assert json.loads(done.stderr)["original_dst"] == V6


def test_tproxy_captures_too(machine: Machine) -> None:
    done = machine.interceptor("run", "--json", "--outbound", "tproxy", "--", "curl", "-s", f"http://{V4}/")
    assert (done.returncode, done.stdout) == (0, "xxxxx")
    assert json.loads(done.stderr)["original_dst"] == V4


def test_without_user_namespaces_the_message_says_what_is_missing(machine: Machine) -> None:
    # A user namespace whose own limit of further ones is zero: the same refusal as a host's sysctl gives.
    limit = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all --inh-caps -all " + " ".join(
        (*INTERCEPTOR, "run", "--", "true")
    )
    done = subprocess.run(
        ["ip", "netns", "exec", machine.host, "unshare", "--user", "--map-root-user", "sh", "-c", limit],
        text=True, capture_output=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "no more user namespaces are allowed here" in done.stderr
    assert "user.max_user_namespaces" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["run"],
        ["run", "--outbound", "off", "--", "true"],
        ["run", "--backend", "foo", "--", "true"],
        ["run", "--outbound-port", "0", "--", "true"],
    ],
)
def test_bad_options_are_refused(machine: Machine, args: list[str]) -> None:
    done = machine.interceptor(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
