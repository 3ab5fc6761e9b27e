"""containerd: a daemon on the node, and its two ways to a pod: `ctr run --cni`, and CRI as a kubelet speaks it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from tests.runtimes import image, protobuf
from tests.runtimes.node import BIN_DIR, DEADLINE_S, NET_DIR, Done, Node
from tests.runtimes.protobuf import Value

SOCKET = "/run/containerd/containerd.sock"
NAMESPACE = "k8s.io"  # CRI's; ctr uses it too, so that the image is loaded once
PROXY_UID = 1337
KILLED = 137  # ctr ends as its task did: 128 + SIGKILL
# Containers of a machine that may not lower oom_score_adj and has no AppArmor, as CI's often are.
CONFIGURATION = """
version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{net}"
"""


@contextmanager
def daemon(node: Node) -> Iterator[None]:
    """containerd runs within the block, with the image loaded."""
    root = str(node.directory / "containerd")
    socket = str(node.directory / "containerd.sock")
    text = CONFIGURATION.format(root=root, socket=socket, image=image.NAME, bin=BIN_DIR, net=NET_DIR)
    node.write("/etc/containerd/config.toml", text)
    with (node.directory / "containerd.log").open("w") as log:
        running = subprocess.Popen(node.inside("containerd"), stdout=log, stderr=log)
    try:
        node.until(lambda: node.attempt(*_ctr(node, "version")).status == 0, "containerd answers")
        node.run(*_ctr(node, "images", "import", "--no-unpack", str(node.image)))
        yield
    finally:
        running.terminate()
        running.wait(timeout=DEADLINE_S)


def _ctr(node: Node, *arguments: str) -> tuple[str, ...]:
    return ("ctr", "--address", str(node.directory / "containerd.sock"), "--namespace", NAMESPACE, *arguments)


@dataclass(slots=True)
class Ctr:
    """`ctr run --cni`: the namespace is /proc/PID/ns/net at ADD, and "" at DEL, which only a ctr that stays calls."""

    node: Node
    publishes: bool = False
    _running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, name: str, ports: Sequence[tuple[int, int]] = ()) -> Done:
        """See Runtime."""
        assert not ports
        argv = _ctr(self.node, "run", "--rm", "--null-io", "--cni", image.NAME, name, *image.COMMAND)
        running = subprocess.Popen(self.node.inside(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.node.until(lambda: running.poll() is not None or "RUNNING" in self._task(name), f"{name} runs or fails")
        if running.poll() is not None:
            stdout, stderr = running.communicate()
            return Done(running.returncode, stdout, stderr)
        self._running[name] = running
        return Done(0, "", "")

    def _task(self, name: str) -> list[str]:
        # A line is: name, pid, state.
        lines = [line.split() for line in self.node.run(*_ctr(self.node, "tasks", "list")).splitlines()]
        return next((line for line in lines if line[0] == name), [])

    def pid(self, name: str) -> int:
        """See Runtime."""
        return int(self._task(name)[1])

    def execute(self, name: str, uid: int, *argv: str) -> Done:
        """See Runtime."""
        return self.node.attempt(
            *_ctr(self.node, "tasks", "exec", "--user", f"{uid}:{uid}", "--exec-id", f"e{uid}", name, *argv)
        )

    def remove(self, name: str) -> Done:
        """See Runtime."""
        running = self._running.pop(name, None)
        if running is None:
            # What a failed `run` leaves: ctr keeps it for who wants to look.
            for kind, *verb in (("tasks", "delete", "--force"), ("containers", "delete"), ("snapshots", "remove")):
                self.node.attempt(*_ctr(self.node, kind, *verb, name))
            return Done(0, "", "")
        self.node.attempt(*_ctr(self.node, "tasks", "kill", "--signal", "SIGKILL", name))
        stdout, stderr = running.communicate(timeout=DEADLINE_S)
        return Done(0 if running.returncode == KILLED else running.returncode, stdout, stderr)


@dataclass(slots=True)
class Cri:
    """The kubelet's side of CRI. A pod holds two containers: the application, and one of the proxy's user."""

    node: Node
    publishes: bool = True
    _channel: grpc.Channel = field(init=False)
    _pods: dict[str, str] = field(default_factory=dict)
    _containers: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._channel = grpc.insecure_channel(f"unix:{self.node.directory / 'containerd.sock'}")

    def call(self, method: str, request: Mapping[int, Value]) -> dict[int, list[int | bytes]]:
        """One call of runtime.v1.RuntimeService. Raises grpc.RpcError."""
        made = self._channel.unary_unary(
            f"/runtime.v1.RuntimeService/{method}", request_serializer=protobuf.encode, response_deserializer=protobuf.decode
        )
        found: dict[int, list[int | bytes]] = made(request, timeout=DEADLINE_S)
        return found

    def start(self, name: str, ports: Sequence[tuple[int, int]] = ()) -> Done:
        """See Runtime."""
        # PodSandboxConfig: metadata (name, uid, namespace), hostname, log_directory, dns_config, port_mappings, linux
        mapped: tuple[Value, ...] = tuple({2: inside, 3: outside} for outside, inside in ports)
        config: dict[int, Value] = {
            1: {1: name, 2: f"uid-{name}", 3: "shop"},
            2: name,
            3: str(self.node.directory / "logs"),
            4: {1: "10.96.0.10"},
            5: mapped,
            8: {},
        }
        try:
            pod = protobuf.text(self.call("RunPodSandbox", {1: config}), 1)
            self._pods[name] = pod
            self._add_container(name, config, image.UID, image.COMMAND)
            self._add_container(name, config, PROXY_UID, ("sleep", "600"))
        except grpc.RpcError as error:
            return Done(1, "", str(error.details()))  # type: ignore[attr-defined]
        return Done(0, pod, "")

    def _add_container(self, name: str, config: Mapping[int, Value], uid: int, command: tuple[str, ...]) -> None:
        # ContainerConfig: metadata, image, command, log_path, linux.security_context (run_as_user, run_as_group: Int64Value)
        container: dict[int, Value] = {
            1: {1: f"c{uid}"},
            2: {1: image.NAME},
            3: command,
            11: f"{name}-{uid}.log",
            15: {2: {5: {1: uid}, 12: {1: uid}}},
        }
        made = protobuf.text(self.call("CreateContainer", {1: self._pods[name], 2: container, 3: config}), 1)
        self.call("StartContainer", {1: made})
        self._containers[name, uid] = made

    def pid(self, name: str) -> int:
        """See Runtime."""
        status = self.call("PodSandboxStatus", {1: self._pods[name], 2: 1})
        # map<string, string> info: entries of key and value; "info" holds JSON.
        for entry in status[2]:
            assert isinstance(entry, bytes)
            pair = protobuf.decode(entry)
            if protobuf.text(pair, 1) == "info":
                return int(json.loads(protobuf.text(pair, 2))["pid"])
        raise AssertionError(f"containerd does not say the pid of {name}")

    def execute(self, name: str, uid: int, *argv: str) -> Done:
        """See Runtime."""
        answer = self.call("ExecSync", {1: self._containers[name, uid], 2: argv, 3: int(DEADLINE_S)})
        return Done(protobuf.number(answer, 3), protobuf.text(answer, 1), protobuf.text(answer, 2))

    def stop(self, name: str) -> None:
        """StopPodSandbox: the application ends and DEL is called; a kubelet may do so several times."""
        self.call("StopPodSandbox", {1: self._pods[name]})

    def remove(self, name: str) -> Done:
        """See Runtime."""
        if name not in self._pods:
            return Done(0, "", "")
        try:
            self.stop(name)
            self.call("RemovePodSandbox", {1: self._pods.pop(name)})
        except grpc.RpcError as error:
            return Done(1, "", str(error.details()))  # type: ignore[attr-defined]
        return Done(0, "", "")

    def loaded_plugins(self) -> list[str]:
        """The types of the plugins that containerd has loaded for pods."""
        for entry in self.call("Status", {1: 1})[2]:
            assert isinstance(entry, bytes)
            pair = protobuf.decode(entry)
            if protobuf.text(pair, 1) == "cniconfig":
                networks = json.loads(protobuf.text(pair, 2))["Networks"]
                return [plugin["Network"]["type"] for plugin in networks[-1]["Config"]["Plugins"]]
        return []
