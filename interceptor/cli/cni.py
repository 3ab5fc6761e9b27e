"""`interceptor cni …`: put the CNI plugin on a node, keep it there, take it away."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import click

from cni.install import node as installing
from cni.install.files import InstallError
from cni.install.node import Change, Node
from cni.launcher import launcher
from interceptor.cli.cni_agent import agent
from interceptor.cli.output import print_json
from interceptor.errors import BackendError, ConfigError, Problem

NET_DIR = "/etc/cni/net.d"
BIN_DIR = "/opt/cni/bin"
NOT_AS_WANTED = 3  # as for `check`


@click.group()
def command() -> None:
    """The CNI plugin: capture each pod when it is made."""


command.add_command(agent)


def _directories(function: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--bin-dir", default=BIN_DIR, metavar="DIR", help=f"Where runtimes look for plugins. [{BIN_DIR}]"),
        click.option("--net-dir", default=NET_DIR, metavar="DIR", help=f"Where runtimes look for conflists. [{NET_DIR}]"),
    ):
        function = option(function)
    return function


_conflist = click.option("--conflist", metavar="NAME", help="The file to change. [the first that runtimes load]")


def _entry_options(function: Any) -> Any:
    for option in (
        click.option("--kubernetes", metavar="JSON", help="The entry's `kubernetes`: the agent asks the API about pods."),
        click.option(
            "--on-failure", type=click.Choice(["block", "bypass"]), help="What becomes of a pod that can't be captured. [block]"
        ),
        click.option("--agent-socket", metavar="PATH", help="Let the node agent at PATH do the work. [in-process]"),
        click.option("--capture", metavar="JSON|@FILE", help="The options of `init` for all pods, as a JSON object. [{}]"),
        click.option("--binary", metavar="FILE", help="The plugin to install. [a launcher for this Python]"),
    ):
        function = option(function)
    return function


@command.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be changed.")
@click.option(
    "--watch", is_flag=True, help="Stay, and put back what others take away. SIGTERM ends it and leaves all in place."
)
@_entry_options
@_conflist
@_directories
def install(dry_run: bool, watch: bool, as_json: bool, **given: Any) -> int:
    """Install the plugin: its file, then, once the agent listens, its entry in the conflist. Can be repeated."""
    node = _node(given, _contradictions(dry_run, watch))
    if watch:
        return _watch(node)
    return _carry_out(installing.changes_to_install if dry_run else installing.install, node, dry_run, as_json)


@command.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be changed.")
@click.option("--conflist", metavar="NAME", help="Taken, so that install's options can be given; every conflist is looked at.")
@_directories
def uninstall(dry_run: bool, as_json: bool, **given: Any) -> int:
    """Take the entry out of every conflist, then remove the plugin's file. The conflist is as it was, byte for byte."""
    node = Node(given["net_dir"], given["bin_dir"], only=given["conflist"])
    return _carry_out(installing.changes_to_uninstall if dry_run else installing.uninstall, node, dry_run, as_json)


@command.command()
@click.option("--conflist", metavar="NAME", help="The file to look at. [all]")
@_directories
def status(as_json: bool, **given: Any) -> int:
    """Say whether new pods are captured, and if not, why. Exit code 3 when something is amiss."""
    try:
        found = installing.status(Node(given["net_dir"], given["bin_dir"], only=given["conflist"]))
    except InstallError as error:
        raise BackendError(str(error)) from error
    if as_json:
        print_json({"conflist": found.conflist, "problems": found.problems})
    elif found.problems:
        print("\n".join(found.problems))
    else:
        print(f"installed: {found.conflist}")
    return NOT_AS_WANTED if found.problems else 0


def _carry_out(verb: Any, node: Node, dry_run: bool, as_json: bool) -> int:
    try:
        changes: list[Change] = [change for change in verb(node) if change.before != change.after]
    except InstallError as error:
        raise BackendError(str(error)) from error
    if as_json:
        print_json({"changed": [change.path for change in changes], "dry_run": dry_run})
    elif dry_run:
        print("".join(change.diff() for change in changes), end="")
    else:
        print("\n".join(f"{'removed' if change.after is None else 'wrote'} {change.path}" for change in changes) or "unchanged")
    return 0


def _watch(node: Node) -> int:
    from cni.install.watch import keep  # ctypes

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())

    def tell(event: str, text: str) -> None:
        print(json.dumps({"event": event, "message": text}), file=sys.stderr, flush=True)

    keep(node, stop, tell)
    return 0


def _contradictions(dry_run: bool, watch: bool) -> list[Problem]:
    """What is wrong with these two together."""
    return [Problem("--dry-run", "", "not with --watch, which changes things")] if dry_run and watch else []


def _node(given: dict[str, Any], problems: list[Problem]) -> Node:
    entry: dict[str, Any] = {"type": "interceptor-cni", "capabilities": {"dns": True}}
    entry["capture"] = _json_object("--capture", given["capture"] or "{}", problems)
    if given["agent_socket"] is not None:
        entry["agentSocket"] = given["agent_socket"]
        if not given["agent_socket"].startswith("/"):
            problems.append(Problem("--agent-socket", given["agent_socket"], "an absolute path"))
    if given["kubernetes"] is not None:
        entry["kubernetes"] = _json_object("--kubernetes", given["kubernetes"], problems)
        if given["agent_socket"] is None:
            problems.append(
                Problem("--kubernetes", given["kubernetes"], "needs --agent-socket: the node agent alone asks the API")
            )
    if given["on_failure"] is not None:
        entry["onFailure"] = given["on_failure"]
    problems += _judge(entry)
    binary = _binary(given["binary"], problems)
    if problems:
        raise ConfigError(problems)
    return Node(given["net_dir"], given["bin_dir"], entry, binary, given["conflist"])


def _judge(entry: dict[str, Any]) -> list[Problem]:
    # By the plugin's own eyes: what it would refuse for each pod is refused here, once.
    from cni import cluster, pod
    from cni.entry import Entry
    from cni.protocol import Request

    problems: list[Problem] = []
    for look in (
        lambda: cluster.read(entry.get("kubernetes", {})),
        lambda: pod.decide(Request("STATUS"), Entry(entry["capture"])),
    ):
        try:
            look()
        except ConfigError as error:
            problems += error.problems
    return problems


def _json_object(option: str, text: str, problems: list[Problem]) -> dict[str, Any]:
    try:
        if text.startswith("@"):
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        found = json.loads(text)
    except OSError as error:
        problems.append(Problem(option, text, error.strerror or str(error)))
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(Problem(option, text[:80], f"a JSON object is wanted: {error}"))
        return {}
    if not isinstance(found, dict):
        problems.append(Problem(option, text[:80], "a JSON object is wanted"))
        return {}
    return found


def _binary(path: str | None, problems: list[Problem]) -> bytes:
    if path is None:
        return launcher().encode()
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        problems.append(Problem("--binary", path, error.strerror or str(error)))
        return b""
    if not content or not os.access(path, os.X_OK):
        problems.append(Problem("--binary", path, "an executable file is wanted; `make cni` builds one"))
    return content
