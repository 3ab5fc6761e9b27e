"""Call a plugin binary as a container runtime does: environment, stdin, exit status, stdout. Knows nothing of what it does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interceptor.netns import entered
from tests.rig.net import Pod

CONTAINER = "0123456789ab"
PREVIOUS: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/x"}],
    "ips": [{"address": "10.0.1.2/24", "gateway": "10.0.1.1", "interface": 0}, {"address": "fd00:1::2/64", "interface": 0}],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dns": {},
}


@dataclass(frozen=True, slots=True)
class Done:
    """What a call gave."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def object(self) -> Any:
        """stdout, which must be one JSON object."""
        found = json.loads(self.stdout)
        assert isinstance(found, dict), self
        return found

    @property
    def code(self) -> int:
        """The error's code; 0 when there is none. An error's shape is judged here too."""
        if self.status == 0:
            return 0
        found = self.object
        assert {"cniVersion", "code", "msg"} <= set(found), found
        assert isinstance(found["code"], int)
        assert found["code"] > 0
        assert found["msg"]
        return found["code"]


@dataclass(frozen=True, slots=True)
class Binary:
    """One shipped form of the plugin, called from `runtime`, the namespace that plays the host."""

    argv: tuple[str, ...]
    runtime: Pod
    agent_socket: str | None = None

    def config(self, version: str = "1.0.0", **keys: Any) -> dict[str, Any]:
        """A plugin object as libcni makes it; `keys` replace, and None takes away."""
        found: dict[str, Any] = {
            "cniVersion": version,
            "name": "podnet",
            "type": "interceptor-cni",
            "capture": {"backend": "nft"},
            "prevResult": {**PREVIOUS, "cniVersion": version},
        }
        if self.agent_socket is not None:
            found["agentSocket"] = self.agent_socket
        found |= keys
        return {key: value for key, value in found.items() if value is not None}

    def call(
        self,
        command: str | None,
        netns: str | None = None,
        config: Mapping[str, Any] | bytes | None = None,
        *,
        timeout_s: float = 60,
        **environment: str | None,
    ) -> Done:
        """One call. `environment` replaces variables, None takes one away."""
        stdin = config if isinstance(config, bytes) else json.dumps(self.config() if config is None else config).encode()
        argv, given = self.argv, variables(command, netns, environment)
        with entered(self.runtime.path):
            done = subprocess.run(argv, input=stdin, env=given, capture_output=True, timeout=timeout_s, check=False)
        return Done(done.returncode, done.stdout, done.stderr.decode())


def variables(command: str | None, netns: str | None, changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of a call, as libcni sets it."""
    given: dict[str, str | None] = {
        "PATH": os.environ["PATH"],
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": CONTAINER,
        "CNI_NETNS": netns,
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "",
        "CNI_PATH": "/opt/cni/bin",
    }
    return {name: value for name, value in {**given, **changes}.items() if value is not None}
