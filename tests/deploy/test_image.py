"""The image, built here and run as what it is for: init container, proxy, installer. Its base is debootstrap's: no registry.

DEBIAN_TREE names a tree that debootstrap made before, for who runs this often.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from interceptor import capture
from tests.deploy.rendering import ROOT, render
from tests.deploy.test_chart import containers
from tests.rig.capturing import options
from tests.rig.servers import Server, serving
from tests.runtimes import image
from tests.runtimes.base import NETWORK
from tests.runtimes.network import PATH, network
from tests.runtimes.node import BIN_DIR, NET_DIR, WORLD, Done, Node, node
from tests.runtimes.podman import Podman

BASE, BUILT = "localhost/debian:12", "localhost/interceptor:test"
MIRROR = "http://deb.debian.org/debian"
BUILD_S = 900.0  # apt and pip on a slow line
WORLD_PORT = 9000
PROXY_UID = 1337
# A site's proxy may sign what pip downloads.
CERTIFICATES = "/etc/ssl/certs"
# As the kubelet does it: nothing can be written, and /run is no tmpfs either.
READ_ONLY = ("--read-only", "--read-only-tmpfs=false")
# As the manifests say it: read-only, nothing gained by setuid programs, no capability but those that are named.
CONFINED = (*READ_ONLY, "--security-opt", "no-new-privileges", "--cap-drop", "ALL")
INIT = (*CONFINED, "--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW", "--user", "0:0")


def run(*argv: str) -> str:
    """The stdout of a command that must succeed. In a mount namespace of its own: its mounts and locks go with it."""
    hidden = 'if [ -d /etc/cni ]; then mount -t tmpfs tmpfs /etc/cni; fi; exec "$@"'
    private = ("unshare", "--mount", "--propagation", "private", "--", "sh", "-ec", hidden, "sh")
    done = subprocess.run([*private, *argv], cwd=ROOT, capture_output=True, text=True, timeout=BUILD_S, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def build(directory: Path) -> None:
    """Build the image into podman's storage. The machine's network is used as apt and pip use it, and for nothing else."""
    storage = ("--root", str(directory / "podman"), "--runroot", str(directory / "buildah"), "--storage-driver", "overlay")
    tree = os.environ.get("DEBIAN_TREE") or str(directory / "debian")
    if not Path(tree).exists():
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", tree, MIRROR)
    container = run("buildah", *storage, "from", "scratch")
    run("buildah", *storage, "add", "--quiet", container, tree, "/")
    run("buildah", *storage, "commit", "--quiet", "--rm", container, BASE)
    unconfined = ("--isolation", "chroot", "--network", "host", "--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro")
    what = ("--build-arg", f"BASE={BASE}", "--file", "deploy/Dockerfile", "--tag", BUILT, ".")
    run("buildah", *storage, "build", *unconfined, *what)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """podman on a node, with the image."""
    with tempfile.TemporaryDirectory(prefix="itc-rt-", ignore_cleanup_errors=True) as directory:
        build(Path(directory))
        with node(Path(directory)) as made:
            found = Podman(made)
            found.prepare()
            yield found


@contextmanager
def application(podman: Podman) -> Iterator[int]:
    """A container with the application alone; its pid."""
    try:
        started = podman.start("app")
        assert started.status == 0, started
        yield podman.pid("app")
    finally:
        podman.remove("app")


def beside(podman: Podman, *arguments: str) -> Done:
    """`podman run ARGUMENTS` in the application's network namespace."""
    return podman.node.attempt(*podman.argv("run", "--network", "container:app", *arguments))


def is_captured(machine: Node, pid: int) -> bool:
    """Whether the namespace holds what `init` writes without options."""
    return capture.check(options(), netns=machine.netns_of(pid)).differences == ()


def test_it_runs_as_nobody_in_particular_and_can_become_nobody_else(podman: Podman) -> None:
    inspected = json.loads(podman.node.run(*podman.argv("image", "inspect", BUILT)))
    assert inspected[0]["Config"]["User"] == f"{PROXY_UID}:{PROXY_UID}"
    setuid = ("find", "/", "-xdev", "-type", "f", "-perm", "/6000")
    assert podman.node.run(*podman.argv("run", "--rm", "--user", "0", "--entrypoint", setuid[0], BUILT, *setuid[1:])) == ""


@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy", "libiptc"])
def test_init_container_and_proxy(podman: Podman, backend: str) -> None:
    machine = podman.node
    with network(machine, "bridge"), application(podman) as pid, serving() as servers:
        servers.listen(Server("world", machine.world, uid=0), WORLD_PORT, protos=("tcp",))
        init = beside(podman, "--rm", *INIT, BUILT, "init", "--backend", backend)
        assert init.status == 0, init
        assert capture.check(options(backend=backend), netns=machine.netns_of(pid)).differences == ()
        started = beside(podman, "--detach", "--name", "proxy", *CONFINED, BUILT)
        assert started.status == 0, started
        try:
            for address in WORLD.values():
                client = ("sh", "-c", f"nc -w 5 {address} {WORLD_PORT} </dev/null")
                # Refused until the proxy listens: captured, and not let through.
                machine.until(
                    lambda argv=client: bool(podman.execute("app", image.UID, *argv).stdout), f"an answer of {address}"
                )
            # Its last records are written when it ends.
            machine.run(*podman.argv("stop", "--time", "10", "proxy"))
            shown = machine.run(*podman.argv("logs", "proxy"))
        finally:
            podman.remove("proxy")
    flows = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    reached = {flow["original_dst"] for flow in flows}
    assert reached == {f"{WORLD['v4']}:{WORLD_PORT}", f"[{WORLD['v6']}]:{WORLD_PORT}"}


def test_init_without_its_capabilities_says_so_and_fails(podman: Podman) -> None:
    with network(podman.node, "bridge"), application(podman) as pid:
        done = beside(podman, "--rm", *CONFINED, "--user", "0:0", BUILT, "init")
        assert not is_captured(podman.node, pid)
    assert done.status not in (0, 125, 126, 127)
    assert "NET_ADMIN" in done.stderr


def test_the_installer_places_a_plugin_that_works(podman: Podman) -> None:
    machine = podman.node
    directories = [f"--volume={path}:{path}" for path in (NET_DIR, BIN_DIR)]
    argv = (*podman.argv("run", "--rm", "--network", "none", *CONFINED, "--user", "0:0", *directories, BUILT), "cni")
    with network(machine, "ptp"):
        before = machine.read(PATH)
        machine.run(*argv, "install", "--binary", "/opt/interceptor/share/interceptor-cni")
        with application(podman) as pid:
            assert is_captured(machine, pid)
        machine.run(*argv, "uninstall")
        assert machine.read(PATH) == before
        assert "interceptor-cni" not in machine.run("ls", BIN_DIR)
    assert machine.addresses_in_use() == []
    assert NETWORK in before


def test_the_daemonset_s_containers_capture_a_pod(podman: Podman) -> None:
    """Agent and installer with the arguments, users and capabilities that the chart gives them, on the node's network."""
    machine = podman.node
    machine.run("mkdir", "-p", "/run/interceptor", "/etc/interceptor")
    rendered = render({"agent": {"kubernetes": None}})
    options_file = next(found["data"]["capture.json"] for found in rendered if found["kind"] == "ConfigMap")
    machine.write("/etc/interceptor/capture.json", options_file)
    ours = [container for container in containers(rendered) if container["name"] in ("agent", "install")]
    assert [container["name"] for container in ours] == ["agent", "install"]
    with network(machine, "bridge"):
        before = machine.read(PATH)
        for container in ours:
            machine.run(
                *podman.argv("run", "--detach", "--name", container["name"], "--network", "host", *as_kubelet(container))
            )
        machine.until(lambda: "interceptor-cni" in machine.read(PATH), "the installer's entry")
        with application(podman) as pid:
            assert is_captured(machine, pid)
        for container in reversed(ours):
            # Its end leaves all in place.
            podman.node.run(*podman.argv("stop", "--time", "10", container["name"]))
            podman.remove(container["name"])
        assert "interceptor-cni" in machine.read(PATH)
        machine.interceptor("cni", "uninstall")
        assert machine.read(PATH) == before


def as_kubelet(container: dict[str, Any]) -> list[str]:
    """podman's arguments for a container of a pod."""
    context = container["securityContext"]
    argv = ["--user", f"{context['runAsUser']}:{context['runAsGroup']}"]
    argv += READ_ONLY if context["readOnlyRootFilesystem"] else []
    argv += ["--security-opt", "no-new-privileges"] if context.get("allowPrivilegeEscalation") is False else []
    argv += [f"--cap-drop={name}" for name in context["capabilities"]["drop"]]
    argv += [f"--cap-add={name}" for name in context["capabilities"].get("add", [])]
    argv += [f"--volume={mount['mountPath']}:{mount['mountPath']}" for mount in container["volumeMounts"]]
    return [*argv, BUILT, *container["args"]]
