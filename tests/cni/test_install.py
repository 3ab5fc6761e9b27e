"""Installed on a node: in order, whole at every moment, beside other writers, and gone without a trace."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cni.install import conflist, files, node
from cni.install.files import InstallError
from cni.install.node import Node
from cni.install.watch import keep
from tests.rig.refusing import Refusable, each_refused

ENTRY: dict[str, Any] = {"type": "interceptor-cni", "capture": {"proxy_uid": 1337}}
CALICO = '{\n  "name": "k8s",\n  "cniVersion": "1.0.0",\n  "plugins": [\n    {"type": "calico", "mtu": 1.0}\n  ]\n}\n'
BRIDGE = '{"cniVersion": "1.0.0", "name": "net", "type": "bridge"}'
DEADLINE_S = 20.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`; fail when it does not come."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node's directories, with calico's conflist and a stray file that no runtime loads."""
    for name in ("net.d", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "net.d" / "10-calico.conflist").write_text(CALICO)
    (tmp_path / "net.d" / "calico-kubeconfig").write_text("secret")
    (tmp_path / "bin" / "calico").write_text("#!/bin/sh\n")
    return tmp_path


def make(root: Path, **changes: Any) -> Node:
    """The node at `root`."""
    return Node(
        **{"net_dir": str(root / "net.d"), "bin_dir": str(root / "bin"), "entry": ENTRY, "binary": b"plugin", **changes}
    )


def test_everything_is_put_in_its_place_and_taken_away_without_a_trace(root: Path) -> None:
    before = contents(root)
    (root / "net.d" / "10-calico.conflist").chmod(0o640)
    wanted = make(root)
    assert [change.path for change in node.install(wanted)] == [wanted.binary_path, str(root / "net.d" / "10-calico.conflist")]
    assert node.status(wanted) == node.Status("10-calico.conflist", ())
    assert os.stat(wanted.binary_path).st_mode & 0o777 == 0o755
    assert (root / "net.d" / "10-calico.conflist").stat().st_mode & 0o777 == 0o640
    assert node.install(wanted) == []
    node.uninstall(wanted)
    assert contents(root) == before
    assert node.uninstall(wanted) == []


def test_a_list_that_is_no_utf8_is_edited_as_well(root: Path) -> None:
    # Runtimes load it: Go's JSON takes what is no UTF-8 for U+FFFD.
    path = root / "net.d" / "10-calico.conflist"
    content = CALICO.encode().replace(b"1.0}", b'1.0, "owner": "M\xfcller"}')
    path.write_bytes(content)
    (root / "net.d" / "20-other.conflist").write_text(CALICO)
    wanted = make(root)
    node.install(wanted)
    assert b"M\xfcller" in path.read_bytes()
    assert node.status(wanted) == node.Status("10-calico.conflist", ())
    node.uninstall(wanted)
    assert path.read_bytes() == content


def test_a_single_configuration_that_is_no_utf8_gets_a_list(root: Path) -> None:
    (root / "net.d" / "10-calico.conflist").unlink()
    (root / "net.d" / "10-bridge.conf").write_bytes(BRIDGE.encode().replace(b'"bridge"', b'"bridge", "owner": "M\xfcller"'))
    node.install(make(root))
    assert json.loads((root / "net.d" / files.OWN_LIST).read_bytes())["plugins"][0]["type"] == "bridge"


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DISK: tuple[Refusable, ...] = (
    *((os, name, NO_SPACE) for name in ("open", "rename", "fsync", "unlink", "fchmod", "fchown", "listdir", "makedirs")),
    (files, "_exchange", NO_SPACE),
)


@pytest.mark.parametrize("loaded", ["10-calico.conflist", "10-bridge.conf"])
def test_a_disk_that_refuses_anything_breaks_nothing(root: Path, loaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loaded.endswith(".conf"):
        (root / "net.d" / "10-calico.conflist").unlink()
        (root / "net.d" / loaded).write_text(BRIDGE)
    wanted, before = make(root), contents(root)
    for number, why in each_refused(lambda: node.install(wanted), monkeypatch, (InstallError,), DISK):
        assert_no_pod_fails(root, f"call {number} of install: {why}")
        assert not why or "No space left" in why
        node.install(wanted)
        assert node.status(wanted).problems == (), f"call {number} of install: {why}"
        node.uninstall(wanted)
        assert contents(root) == before, f"call {number} of install: {why}"
    node.install(wanted)
    for number, why in each_refused(lambda: node.uninstall(wanted), monkeypatch, (InstallError,), DISK):
        assert_no_pod_fails(root, f"call {number} of uninstall: {why}")
        node.uninstall(wanted)
        assert contents(root) == before, f"call {number} of uninstall: {why}"
        node.install(wanted)


def assert_no_pod_fails(root: Path, about: str) -> None:
    """Each configuration that a runtime may load is whole, and none names a binary that is not there."""
    for path in sorted((root / "net.d").glob("*.conflist")):
        plugins = conflist.validate(path.read_text())["plugins"]
        if any(plugin["type"] == conflist.TYPE for plugin in plugins):
            assert os.access(root / "bin" / conflist.TYPE, os.X_OK), about


def test_what_others_change_meanwhile_stays(root: Path) -> None:
    node.install(make(root))
    path = root / "net.d" / "10-calico.conflist"
    path.write_text(path.read_text().replace('"mtu": 1.0', '"mtu": 9000'))
    node.uninstall(make(root))
    assert path.read_text() == CALICO.replace('"mtu": 1.0', '"mtu": 9000')


def test_a_single_configuration_is_never_edited(root: Path) -> None:
    (root / "net.d" / "10-calico.conflist").unlink()
    (root / "net.d" / "10-bridge.conf").write_text(BRIDGE)
    before = contents(root)
    node.install(make(root))
    own = root / "net.d" / files.OWN_LIST
    assert (root / "net.d" / "10-bridge.conf").read_text() == BRIDGE
    assert [plugin["type"] for plugin in json.loads(own.read_text())["plugins"]] == ["bridge", "interceptor-cni"]
    assert own.stat().st_mode & 0o777 == 0o600
    # What a runtime loads now is ours.
    assert sorted(name for name in os.listdir(root / "net.d") if name.endswith((".conf", ".conflist")))[0] == files.OWN_LIST
    node.uninstall(make(root))
    assert contents(root) == before


def test_our_list_goes_when_the_single_configuration_becomes_a_list(root: Path) -> None:
    calico = (root / "net.d" / "10-calico.conflist").read_text()
    (root / "net.d" / "10-calico.conflist").unlink()
    (root / "net.d" / "10-bridge.conf").write_text(BRIDGE)
    node.install(make(root))
    (root / "net.d" / "05-calico.conflist").write_text(calico)
    node.install(make(root))
    assert not (root / "net.d" / files.OWN_LIST).exists()
    assert node.status(make(root)).problems == ()


@pytest.mark.parametrize(
    "bad", ["{", "[]", '{"name": "x"}', '{"name": "x", "plugins": []}', '{"name": "x", "plugins": [{"type": "a", "mtu": NaN}]}']
)
def test_the_first_that_a_runtime_loads_is_chosen(root: Path, bad: str) -> None:
    (root / "net.d" / "00-broken.conflist").write_text(bad)
    (root / "net.d" / "20-other.conflist").write_text(CALICO)
    node.install(make(root))
    assert (root / "net.d" / "00-broken.conflist").read_text() == bad
    assert (root / "net.d" / "20-other.conflist").read_text() == CALICO
    assert node.status(make(root)).conflist == "10-calico.conflist"


def test_a_single_configuration_before_ours_is_refused(root: Path) -> None:
    # A runtime would go on loading it, and every pod go uncaptured.
    (root / "net.d" / "10-calico.conflist").unlink()
    (root / "net.d" / "00-bridge.conf").write_text(BRIDGE)
    before = contents(root / "net.d")
    with pytest.raises(InstallError, match=r"00-bridge\.conf: rename it"):
        node.install(make(root))
    assert contents(root / "net.d") == before


def test_a_single_configuration_that_came_before_ours_is_amiss(root: Path) -> None:
    (root / "net.d" / "10-calico.conflist").rename(root / "net.d" / "calico")
    (root / "net.d" / "10-bridge.conf").write_text(BRIDGE)
    node.install(make(root))
    assert node.status(make(root)).problems == ()
    (root / "net.d" / "00-bridge.conf").write_text(BRIDGE)
    assert "runtimes load 00-bridge.conf instead" in " ".join(node.status(make(root)).problems)


def test_a_conflist_that_is_a_link_stays_one(root: Path) -> None:
    link, real = root / "net.d" / "10-calico.conflist", root / "real"
    link.rename(real)
    link.symlink_to("../real")
    node.install(make(root))
    assert "interceptor-cni" in real.read_text()
    assert (root / "net.d").joinpath("10-calico.conflist").readlink() == Path("../real")
    node.uninstall(make(root))
    assert (link.readlink(), real.read_text()) == (Path("../real"), CALICO)


def cli(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "interceptor", "cni", *arguments]
    directories = ["--net-dir", str(root / "net.d"), "--bin-dir", str(root / "bin")]
    return subprocess.run([*argv, *directories], capture_output=True, text=True, check=False, timeout=20)


@pytest.mark.parametrize("verb", [("install",), ("install", "--dry-run"), ("uninstall",), ("status",)], ids=" ".join)
@pytest.mark.parametrize("name", ["net.d", "bin/interceptor-cni"])
def test_what_is_in_the_way_is_named(root: Path, verb: tuple[str, ...], name: str) -> None:
    shutil.rmtree(root / "net.d")
    if name == "net.d":
        (root / name).touch()
    else:
        (root / name).mkdir()
    done = cli(root, *verb)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert str(root / name) in done.stderr


def test_a_dry_run_changes_nothing_and_does_not_watch(root: Path) -> None:
    before = contents(root)
    done = cli(root, "install", "--dry-run")
    assert (done.returncode, "+++ " in done.stdout) == (0, True)
    assert cli(root, "install", "--dry-run", "--watch").returncode == 2
    assert contents(root) == before
    assert cli(root, "install").returncode == 0
    installed = contents(root)
    assert (cli(root, "uninstall", "--dry-run").returncode, contents(root)) == (0, installed)


def test_without_a_primary_plugin_nothing_is_done_to_the_conflists(root: Path) -> None:
    (root / "net.d" / "10-calico.conflist").unlink()
    before = contents(root / "net.d")
    with pytest.raises(InstallError, match="no valid network configuration"):
        node.install(make(root))
    assert contents(root / "net.d") == before


def test_without_the_agent_the_conflist_stays_as_it_is(root: Path) -> None:
    wanted = make(root, entry={**ENTRY, "agentSocket": str(root / "agent.sock")})
    with pytest.raises(InstallError, match="does not listen"):
        node.install(wanted, socket_wait_s=0)
    assert (root / "net.d" / "10-calico.conflist").read_text() == CALICO
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "agent.sock"))
        sock.listen()
        node.install(wanted, socket_wait_s=0)
        assert node.status(wanted).problems == ()
    assert "does not listen" in " ".join(node.status(wanted).problems)


def test_a_directory_that_cannot_be_made_is_named(root: Path) -> None:
    (root / "file").touch()
    with pytest.raises(InstallError, match=r"file: File exists"):
        node.install(make(root, bin_dir=str(root / "file")))
    assert (root / "net.d" / "10-calico.conflist").read_text() == CALICO


def test_all_that_is_wrong_with_an_entry_is_told_at_once(root: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "interceptor",
        "cni",
        "install",
        "--net-dir",
        str(root / "net.d"),
        "--bin-dir",
        str(root / "bin"),
    ]
    argv += ["--agent-socket", "relative", "--kubernetes", '{"no": 1}', "--capture", '{"dnss": "all", "inbound": "up"}']
    done = subprocess.run([*argv, "--binary", "/none"], capture_output=True, text=True, check=False)
    named = ("--agent-socket", "kubernetes.no", "capture.dnss", "capture.inbound", "--binary")
    assert (done.returncode, [name for name in named if name not in done.stderr]) == (2, [])


def test_uninstall_leaves_the_binary_while_a_conflist_names_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = make(root)
    node.install(wanted)
    path = root / "net.d" / "10-calico.conflist"
    ours = path.read_text()

    def poked(_folder: str) -> None:
        path.write_text(ours)  # another program writes what it has read before, each time

    monkeypatch.setattr(files, "poke", poked)
    with pytest.raises(InstallError, match="rewrites the conflist all the time"):
        node.uninstall(wanted)
    assert Path(wanted.binary_path).exists()


def test_status_names_what_is_amiss(root: Path) -> None:
    wanted = make(root)
    assert len(node.status(wanted).problems) == 2
    node.install(wanted)
    path = root / "net.d" / "10-calico.conflist"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plugins": [{"type": "calico"}, ENTRY, {"type": "late"}]}))
    os.unlink(wanted.binary_path)
    problems = node.status(wanted).problems
    assert any("another plugin stands behind" in problem for problem in problems)
    assert any("missing" in problem for problem in problems)


# For each line, forks a process that does it and kills it after so many seconds: importing everything is done once.
KILLED = """
import os, signal, sys
from cni.install import node
wanted = node.Node(*sys.argv[2:4], {'type': 'interceptor-cni'}, b'x' * 2000000)
ends = {signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, ends)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            getattr(node, sys.argv[1])(wanted)
        finally:
            os._exit(0)
    signal.sigtimedwait(ends, float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    signal.sigtimedwait(ends, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_killed_at_any_moment_it_leaves_whole_files_and_is_mended_by_the_next_run(root: Path, verb: str) -> None:
    chance = random.Random(4)
    before = contents(root)
    argv = [sys.executable, "-c", KILLED, verb, str(root / "net.d"), str(root / "bin")]
    wanted = make(root, entry={"type": "interceptor-cni"}, binary=b"x" * 2000000)
    ended = set()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killing:
        assert killing.stdin is not None
        assert killing.stdout is not None
        for _ in range(100):
            if verb == "uninstall":
                node.install(wanted)
            killing.stdin.write(f"{chance.uniform(0, 0.02)}\n")
            killing.stdin.flush()
            ended.add(killing.stdout.readline().strip())
            found = conflist.validate((root / "net.d" / "10-calico.conflist").read_text())
            if any(plugin["type"] == "interceptor-cni" for plugin in found["plugins"]):
                assert Path(wanted.binary_path).read_bytes() == wanted.binary
        killing.stdin.close()
    assert str(-signal.SIGKILL) in ended
    node.install(wanted)
    assert node.status(wanted).problems == ()
    node.uninstall(wanted)
    assert contents(root) == before


@pytest.fixture
def keeping(root: Path) -> Iterator[list[tuple[str, str]]]:
    """`keep` at work on `root`, and what it tells."""
    told: list[tuple[str, str]] = []
    stop = threading.Event()
    thread = threading.Thread(target=keep, args=(make(root), stop, lambda *event: told.append(event)))
    thread.start()
    yield told
    stop.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def rewrite(path: Path, text: str) -> None:
    """As a careful program does, and as nobody sees half of it: an empty file, seen between, would be "trouble"."""
    new = path.with_suffix(".calico")
    new.write_text(text)
    new.rename(path)


def test_what_another_writer_takes_away_is_put_back(root: Path, keeping: list[tuple[str, str]]) -> None:
    path = root / "net.d" / "10-calico.conflist"
    until(lambda: "interceptor-cni" in path.read_text())
    for take_away in (lambda: rewrite(path, CALICO), lambda: (root / "bin" / "interceptor-cni").unlink()):
        take_away()
        until(lambda: not node.status(make(root)).problems)
    assert {event for event, _ in keeping} == {"repaired"}


def test_beside_a_writer_that_never_stops_the_file_is_whole_and_the_fight_told(
    root: Path, keeping: list[tuple[str, str]]
) -> None:
    path = root / "net.d" / "10-calico.conflist"
    until(lambda: "interceptor-cni" in path.read_text())
    rounds = 0
    while not any(event == "fight" for event, _ in keeping):
        rounds += 1
        assert rounds < 50, keeping
        rewrite(path, CALICO.replace('mtu": 1.0', f'mtu": {rounds}'))
        again = time.monotonic() + 0.1
        while time.monotonic() < again:
            conflist.validate(path.read_text())
    until(lambda: not node.status(make(root)).problems)
    assert f'"mtu": {rounds}' in path.read_text()


def test_a_directory_that_was_replaced_is_found_again(root: Path) -> None:
    # inotify watches the old one, and tells nothing of one that is not there: the poll does.
    stop = threading.Event()
    thread = threading.Thread(target=keep, args=(make(root), stop, lambda *_: None, 0.05))
    thread.start()
    try:
        path = root / "net.d" / "10-calico.conflist"
        until(lambda: "interceptor-cni" in path.read_text())
        (root / "net.d").rename(root / "gone")
        (root / "new").mkdir()
        (root / "new" / path.name).write_text(CALICO)
        (root / "new").rename(root / "net.d")
        until(lambda: "interceptor-cni" in path.read_text())
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert node.status(make(root)).problems == ()


def test_it_ends_and_leaves_everything_in_place(root: Path) -> None:
    argv = [sys.executable, "-m", "interceptor", "cni", "install", "--watch"]
    running = subprocess.Popen([*argv, "--net-dir", str(root / "net.d"), "--bin-dir", str(root / "bin")])
    until(lambda: not node.status(make(root, entry={}, binary=b"")).problems)
    running.terminate()
    assert running.wait(DEADLINE_S) == 0
    assert not node.status(make(root, entry={}, binary=b"")).problems
