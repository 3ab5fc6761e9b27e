"""The command line: what is printed where, in which form, and with which exit code. Nothing here touches the kernel."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from interceptor.__main__ import main
from interceptor.cli import COMMANDS
from interceptor.config import FIELDS, SWITCH, Field
from interceptor.errors import ConfigError
from interceptor.proxy_options import PROXY_GROUPS
from tests.rig.client import wait_until

INTERCEPTOR = (sys.executable, "-m", "interceptor")
CONFIGURED = ("init", "plan", "check", "explain", "probe", "config", "proxy", "announce")
Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, *args: str) -> str:
    """What the command prints, when it succeeds and says nothing else."""
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def failed(capsys: Capture, *args: str) -> list[str]:
    """The lines on stderr of a command that is refused, with nothing on stdout."""
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, out) == (ConfigError.exit_code, "")
    return err.splitlines()


def test_help_lists_all_commands_in_the_order_of_use(capsys: Capture) -> None:
    words = [line.split()[0] for line in printed(capsys, "--help").splitlines() if line.startswith("  ")]

    assert [word for word in words if word in COMMANDS] == list(COMMANDS)


def test_without_a_command_the_help_is_shown(capsys: Capture) -> None:
    assert printed(capsys) == printed(capsys, "--help")


def test_version_names_the_program(capsys: Capture) -> None:
    assert printed(capsys, "--version").startswith("interceptor 0.")


# `cni` works on a node's directories.
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "cni"])
def test_command_has_netns_and_json(capsys: Capture, command: str) -> None:
    text = printed(capsys, command, "--help")

    assert "--netns NAME|PATH|PID" in text
    assert "--json" in text


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.name)
def test_option_is_in_the_help_under_its_group(capsys: Capture, row: Field) -> None:
    sections = printed(capsys, "proxy", "--help").split("\n\n")

    assert [section.splitlines()[0] for section in sections if f"  {row.flag} " in section] == [f"{row.group}:"]


@pytest.mark.parametrize("command", ["init", "config"])
def test_what_only_a_proxy_reads_is_taken_and_not_shown_by_the_others(capsys: Capture, command: str) -> None:
    text = printed(capsys, command, "--help")

    assert [row.flag for row in FIELDS if row.group in PROXY_GROUPS and row.flag in text] == []
    assert json.loads(printed(capsys, "config", "--json", "--peek", "host", "--peek", "sni"))["peek"]["value"] == "host,sni"


@pytest.mark.parametrize("row", [row for row in FIELDS if row.kind is SWITCH], ids=lambda row: row.name)
@pytest.mark.parametrize(("prefix", "value"), [("--", "true"), ("--no-", "false")])
def test_switch_is_turned_on_and_off(capsys: Capture, row: Field, prefix: str, value: str) -> None:
    found = json.loads(printed(capsys, "config", "--json", row.flag.replace("--", prefix, 1)))

    assert found[row.name] == {"value": value, "origin": f"flag {row.flag}"}


def test_config_shows_value_and_origin(capsys: Capture) -> None:
    lines = [
        line.split(maxsplit=2) for line in printed(capsys, "config", "--exclude-uids", "3", "--exclude-uids", "5").splitlines()
    ]

    assert ["exclude_uids", "3,5", "flag --exclude-uids"] in lines
    assert ["outbound_port", "15001", "default"] in lines


def test_config_reads_standard_input() -> None:
    run = subprocess.run(
        (*INTERCEPTOR, "config", "--json", "--config", "-"), input="udp: tproxy", capture_output=True, text=True, check=True
    )

    assert json.loads(run.stdout)["udp"] == {"value": "tproxy", "origin": "file standard input"}


def test_config_reads_the_environment() -> None:
    environment = os.environ | {"INTERCEPTOR_UDP": "tproxy"}
    run = subprocess.run((*INTERCEPTOR, "config", "--json"), env=environment, capture_output=True, text=True, check=True)

    assert json.loads(run.stdout)["udp"]["origin"] == "environment INTERCEPTOR_UDP"


def test_config_with_a_namespace_that_is_not_there_is_an_error(capsys: Capture) -> None:
    assert main(["config", "--netns", "no-such-netns"]) == 4
    assert "no-such-netns" in capsys.readouterr().err


def test_all_bad_values_are_told_at_once(capsys: Capture) -> None:
    lines = failed(capsys, "plan", "--outbound-port", "0", "--dns", "yes", "--proxy-uid", "no_such_user")

    assert [line.split(":")[1].strip() for line in lines] == ["--dns", "--outbound-port", "--proxy-uid"]
    assert {line.split(":")[0] for line in lines} == {"interceptor"}


def test_error_as_json_stands_on_stdout(capsys: Capture) -> None:
    code = main(["plan", "--json", "--outbound-port", "foo"])
    out, err = capsys.readouterr()

    assert (code, err) == (2, "")
    assert json.loads(out)["error"]["problems"] == [
        {"option": "--outbound-port", "value": "foo", "expected": "'foo' is no port: a number from 1 to 65535"}
    ]


@pytest.mark.parametrize("args", [["plan", "--outbond-port", "1"], ["no-such-command"], ["plan", "extra"], ["plan", "--netns"]])
def test_misuse_of_the_command_line_is_exit_code_2_with_a_hint(capsys: Capture, args: list[str]) -> None:
    lines = failed(capsys, *args)

    assert len(lines) == 1
    assert lines[0].startswith("interceptor: ")
    assert "--help` shows what there is" in lines[0]


def test_json_behind_runs_command_is_the_commands(capsys: Capture) -> None:
    assert main(["run", "--dns", "x", "true", "--json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "interceptor: --dns: 'x': one of off, resolv-conf, all\n")


def test_misuse_as_json_stands_on_stdout(capsys: Capture) -> None:
    assert main(["plan", "--nonsense", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"


def test_plan_prints_what_nft_would_read(capsys: Capture) -> None:
    assert "table inet interceptor {" in printed(capsys, "plan")


def test_plan_prints_both_families_for_iptables(capsys: Capture) -> None:
    text = printed(capsys, "plan", "--format", "iptables", "--ip-family", "v4")

    assert text.count("*nat") == 1
    assert ":INTERCEPT_OUTBOUND - [0:0]" in text


def test_plan_of_a_cgroup_has_no_iptables_text(capsys: Capture) -> None:
    assert main(["plan", "--proxy-cgroup", "a", "--format", "iptables"]) == ConfigError.exit_code
    assert "--format" in capsys.readouterr().err


def test_plan_takes_its_format_from_the_backend(capsys: Capture) -> None:
    assert printed(capsys, "plan", "--backend", "libiptc") == printed(capsys, "plan", "--format", "iptables")


def test_plan_prints_policy_routes_as_comments(capsys: Capture) -> None:
    assert "# policy route: IPv4: fwmark 0x539/0xfff lookup 133" in printed(capsys, "plan", "--outbound", "tproxy")


def test_plan_as_json_is_one_document_by_either_option(capsys: Capture) -> None:
    text = printed(capsys, "plan", "--format", "json")

    assert json.loads(text)["schema"] == 1
    assert text == printed(capsys, "plan", "--json")


def test_dry_run_of_init_is_plan(capsys: Capture) -> None:
    assert printed(capsys, "init", "--dry-run", "--dns", "all") == printed(capsys, "plan", "--dns", "all")


def test_explain_names_fate_rule_reason_and_option(capsys: Capture) -> None:
    text = printed(
        capsys, "explain", "--dst", "192.0.2.9", "--dport", "443", "--uid", "1000", "--exclude-outbound-ports", "443"
    )

    assert [line.split(maxsplit=1) for line in text.splitlines() if "packet" not in line] == [
        ["direct"],
        ["why", "this port is excluded"],
        ["option", "--exclude-outbound-ports"],
        ["chain", "nat OUTBOUND"],
    ]


def test_explain_says_how_a_packet_is_captured(capsys: Capture) -> None:
    text = printed(capsys, "explain", "--in-interface", "eth0", "--dport", "8080", "--inbound", "tproxy")

    assert text.startswith("captured: tproxy to the proxy's port 15006\n")


def test_explain_knows_the_time_before_the_proxy(capsys: Capture) -> None:
    asked = ("explain", "--dst", "192.0.2.9", "--uid", "1000", "--before-proxy", "bypass")

    assert printed(capsys, *asked, "--early").startswith("direct\n")
    assert printed(capsys, *asked).startswith("captured: ")


def test_explain_shows_the_trail_when_asked(capsys: Capture) -> None:
    text = printed(capsys, "explain", "--dst", "192.0.2.9", "--uid", "1337", "-v")

    assert "  - nat OUTPUT: outbound: jump OUTBOUND (--outbound)" in text.splitlines()


def test_explain_as_json_has_the_trail(capsys: Capture) -> None:
    found = json.loads(printed(capsys, "explain", "--dst", "192.0.2.9", "--uid", "1000", "--json"))

    assert (found["fate"], found["mechanism"], found["port"]) == ("captured", "redirect", 15001)
    assert found["deciding"] == {"why": "captured outbound", "option": "--outbound redirect", "chain": "nat OUTBOUND"}
    assert found["trail"][-1]["verdict"] == {"kind": "redirect", "port": 15001}


def test_explain_takes_loopback_to_go_out_on_lo(capsys: Capture) -> None:
    assert "tcp 127.0.0.1 -> 127.0.0.1:80, uid 1000, gid 1000, out lo" in printed(
        capsys, "explain", "--dst", "127.0.0.1", "--uid", "1000"
    )


def test_explain_tells_all_that_is_wrong_with_the_packet(capsys: Capture) -> None:
    lines = failed(capsys, "explain", "--dst", "x", "--uid", "1-3", "--mark", "-1", "--dport", "0", "--out-interface", "a b")

    assert [line.split(":")[1].strip() for line in lines] == ["--uid", "--dst", "--dport", "--mark", "--out-interface"]


@pytest.mark.parametrize(
    "args", [("--uid", "1"), ("--gid", "1"), ("--out-interface", "eth1")], ids=["uid", "gid", "out-interface"]
)
def test_explain_refuses_what_a_packet_that_comes_in_cannot_have(capsys: Capture, args: tuple[str, str]) -> None:
    (line,) = failed(capsys, "explain", "--in-interface", "eth0", *args)

    assert line.startswith(f"interceptor: {args[0]}: '{args[1]}': a packet that comes in, as --in-interface says")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        pytest.param(("plan", "--format", "yaml", "--dns-port", "15001"), ["--dns-port", "--format"], id="plan"),
        pytest.param(
            ("plan", "--format", "iptables", "--proxy-cgroup", "a", "--inbound-port", "0"),
            ["--inbound-port", "--format"],
            id="plan of a cgroup",
        ),
        pytest.param(("plan", "--json", "--format", "nft"), None, id="plan in two forms"),
        pytest.param(
            ("explain", "--proto", "icmp", "--dport", "x", "--udp", "y"), ["--udp", "--proto", "--dport", "--dst"], id="explain"
        ),
        pytest.param(
            ("proxy", "--user", "1:", "--drain-deadline", "nan", "--dns-port", "0"),
            ["--dns-port", "--drain-deadline", "--user"],
            id="proxy",
        ),
        pytest.param(("proxy", "--user", "1-2", "--drain-deadline", "soon"), ["--drain-deadline", "--user"], id="proxy's own"),
        pytest.param(("proxy", "--outbound", "off", "--inbound", "off"), ["--outbound"], id="proxy for nothing"),
        pytest.param(("demo", "--requests", "0", "--backend", "ipfw"), ["--requests", "--backend"], id="demo"),
        pytest.param(("run", "--flows", "/no/such/dir/f", "--dns", "x", "--", "true"), ["--dns", "--flows"], id="run"),
    ],
)
def test_a_commands_own_options_are_told_with_all_others(
    capsys: Capture, args: tuple[str, ...], told: list[str] | None
) -> None:
    if told is None:
        assert main(args) == ConfigError.exit_code
        assert json.loads(capsys.readouterr().out)["error"]["problems"][0]["option"] == "--format"
        return
    assert [line.split(":")[1].strip() for line in failed(capsys, *args)] == told


def test_bad_options_leave_the_file_for_flows_as_it_is(capsys: Capture, tmp_path: Path) -> None:
    flows = tmp_path / "flows"
    flows.write_text("of yesterday")

    failed(capsys, "run", "--flows", str(flows), "--outbound-port", "0", "--", "true")

    assert flows.read_text() == "of yesterday"


def test_explain_asks_for_a_destination(capsys: Capture) -> None:
    assert failed(capsys, "explain")[0].startswith("interceptor: --dst: ")


def test_explain_refuses_a_packet_of_two_families(capsys: Capture) -> None:
    assert "another IP family" in failed(capsys, "explain", "--src", "10.0.0.1", "--dst", "fd00::1")[0]


def test_closed_pipe_is_no_error_message() -> None:
    run = subprocess.Popen((*INTERCEPTOR, "plan"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    run.stdout.close()
    assert run.stderr is not None
    complaint = run.stderr.read()
    run.stderr.close()

    assert (run.wait(timeout=10), complaint) == (141, "")


def test_interrupt_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen((*INTERCEPTOR, "config", "--config", str(pipe)), stderr=subprocess.PIPE, text=True) as run:
        # Opening it for writing waits until the command opens it. A signal just before it sleeps in read() would wait for data.
        with pipe.open("w"):
            wait_until(lambda: psutil.Process(run.pid).status() == psutil.STATUS_SLEEPING, "the command reads its file")
            run.send_signal(signal.SIGINT)
            code = run.wait(timeout=10)
        assert run.stderr is not None
        assert (code, run.stderr.read().strip()) == (130, "")


@pytest.mark.parametrize(
    ("args", "full", "code"),
    [
        (("plan",), "stdout", 1),
        (("plan", "--json"), "stdout", 1),
        (("plan", "--json", "--dns", "x"), "stdout", 1),
        (("plan", "--dns", "x"), "stderr", 2),
    ],
)
def test_a_full_disk_is_no_traceback(args: tuple[str, ...], full: str, code: int) -> None:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with open("/dev/full", "w") as disk:
        done = subprocess.run((*INTERCEPTOR, *args), check=False, text=True, **(streams | {full: disk}))  # type: ignore[call-overload]

    assert done.returncode == code
    if full == "stdout":
        assert done.stderr == "interceptor: No space left on device: the output, or a temporary file, could not be written\n"


@pytest.mark.parametrize("command", ["config", "plan"])
def test_a_locale_that_cannot_write_a_name_is_no_traceback(command: str) -> None:
    done = subprocess.run(
        (*INTERCEPTOR, command, "--proxy-cgroup", "é"),
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )

    assert b"\\xe9" in done.stdout


def test_a_path_that_is_no_namespace_is_refused(capsys: Capture) -> None:
    assert main(["config", "--netns", "/etc/passwd"]) == 4
    assert capsys.readouterr().err == "interceptor: /etc/passwd is not a network namespace\n"


def test_run_with_few_open_files_says_how_many_it_needs(capsys: Capture) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, before[1]))
    try:
        assert main(["run", "--", "true"]) == 6
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "needs 64 open files" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_standard_streams_are_no_error(tmp_path: Path, closed: str) -> None:
    errors = tmp_path / "errors"
    redirected = closed if "2>" in closed else f"{closed} 2>{errors}"
    command = " ".join((*INTERCEPTOR, "config", redirected))

    assert subprocess.run(["sh", "-c", command], check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert not errors.exists() or errors.read_text() == ""
