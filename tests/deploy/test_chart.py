"""What the chart and the manifests give: objects that Kubernetes takes, no right more than needed, commands that we know."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.rendering import CHART, MANIFEST, ROOT, manifest, merged, render, values

# The oldest that the chart allows, and the newest whose schema the pinned package holds.
VERSIONS = ("1.27", "1.33")
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "uninstall": {"mode": "uninstall"},
    "in-process": {"agent": {"enabled": False}},
    "in-process, uninstall": {"agent": {"enabled": False}, "mode": "uninstall"},
    "without the API": {"agent": {"kubernetes": None}},
    "by digest": {"image": {"digest": f"sha256:{'0' * 64}"}, "imagePullSecrets": [{"name": "mine"}]},
    "all options": {
        "capture": {"dns": "all", "exclude_outbound_ports": [22, "6000-6100"]},
        "cni": {"conflist": "10-calico.conflist", "confDir": "/var/snap/cni", "binDir": "/home/cni/bin"},
        "agent": {"healOldPods": True, "repair": "delete", "kubernetes": {"excludeNamespaces": ["kube-system", "mine"]}},
        "podAnnotations": {"prometheus.io/scrape": "false"},
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    },
}
CAPABILITIES = {"agent": {"NET_ADMIN", "NET_RAW", "SYS_ADMIN"}, "interceptor-init": {"NET_ADMIN", "NET_RAW"}}


def example() -> list[dict[str, Any]]:
    """The example of an init container."""
    return list(yaml.safe_load_all((ROOT / "deploy/manifests/init-container.yaml").read_text()))


def containers(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each of our containers."""
    for found in objects:
        spec = found.get("spec", {}).get("template", found).get("spec", {})
        for container in spec.get("initContainers", []) + spec.get("containers", []):
            if container["image"].startswith("interceptor"):
                yield container


@pytest.fixture(scope="module", params=VARIANTS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The chart's objects in each variant."""
    return render(VARIANTS[request.param])


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(objects: list[dict[str, Any]], version: str) -> None:
    builtin = [found for found in objects if "monitoring.coreos.com" not in found["apiVersion"]]
    assert {"DaemonSet", "ServiceAccount", "ConfigMap"} <= {found["kind"] for found in builtin}
    for found in builtin + example():
        # Strict: a key that Kubernetes does not know is dropped by it silently.
        kubernetes_validate.validate(found, version, strict=True)


def test_every_variant_keeps_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for changes in VARIANTS.values():
        jsonschema.validate(merged(values(), changes), schema)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "remove"},
        {"onFailure": "ignore"},
        {"image": {"digest": "latest"}},
        {"cni": {"confDir": "etc/cni"}},
        {"cni": {"conflist": "10-calico.conf"}},
        {"agent": {"socket": "cni.sock"}},
        {"agent": {"http": {"port": 0}}},
        {"colour": "red"},
        {"podMonitor": {"interval": "30"}},
    ],
    ids=json.dumps,
)
def test_the_schema_refuses_a_slip(changes: dict[str, Any]) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged(values(), changes), schema)


def test_no_container_may_more_than_it_needs(objects: list[dict[str, Any]]) -> None:
    found = list(containers(objects + example()))
    assert found
    for container in found:
        context = container["securityContext"]
        assert context["capabilities"]["drop"] == ["ALL"]
        wanted = CAPABILITIES.get(container["name"], set())
        if any("--entry" in argument for argument in container.get("args", [])):
            wanted = wanted | {"SYS_PTRACE"}  # pods that were there before are found by the host's processes
        assert set(context["capabilities"].get("add", [])) == wanted, container["name"]
        assert context["readOnlyRootFilesystem"] is True
        # Kubernetes ties the two together.
        assert context.get("allowPrivilegeEscalation", True) == ("SYS_ADMIN" in context["capabilities"].get("add", []))
        assert "privileged" not in context


def test_the_agent_may_ask_the_api_for_little() -> None:
    def rights(changes: dict[str, Any]) -> set[tuple[str, str]]:
        rules = [rule for found in render(changes) if found["kind"] == "ClusterRole" for rule in found["rules"]]
        assert all(rule["apiGroups"] == [""] for rule in rules)
        return {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}

    least = {("pods", "get"), ("pods", "list"), ("pods", "watch"), ("namespaces", "get"), ("events", "create")}
    assert rights({"agent": {"untaint": False}}) == least
    assert rights({}) == least | {("nodes", "get"), ("nodes", "patch")}
    assert rights({"agent": {"repair": "label"}}) - rights({}) == {("pods", "patch")}
    assert rights({"agent": {"repair": "delete"}}) - rights({}) == {("pods", "delete")}
    assert rights({"agent": {"enabled": False}}) == rights({"agent": {"kubernetes": None}}) == set()


def test_the_installer_knows_its_options(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    """A node's directories are made under tmp_path, and the rendered command says what it would do there."""
    configured = next((found["data"]["capture.json"] for found in objects if found["kind"] == "ConfigMap"), None)
    assert configured is not None
    (tmp_path / "capture.json").write_text(configured)
    (tmp_path / "plugin").write_text("#!/bin/sh\n")
    (tmp_path / "plugin").chmod(0o755)
    (tmp_path / "net.d").mkdir()
    conflist = {"cniVersion": "1.0.0", "name": "k8s", "plugins": [{"type": "calico"}]}
    (tmp_path / "net.d/10-calico.conflist").write_text(json.dumps(conflist))
    places = {
        "--net-dir": tmp_path / "net.d",
        "--bin-dir": tmp_path / "bin",
        "--binary": tmp_path / "plugin",
        "--capture": f"@{tmp_path}/capture.json",
    }
    for container in containers(objects):
        if container.get("args", [])[:2] in (["cni", "install"], ["cni", "uninstall"]):
            named = [(argument, argument.partition("=")[0]) for argument in container["args"] if argument != "--watch"]
            argv = [f"{name}={places[name]}" if name in places else argument for argument, name in named]
            done = subprocess.run(
                [sys.executable, "-m", "interceptor", *argv, "--dry-run"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert ("interceptor-cni" in done.stdout) == (container["name"] == "install")


def test_the_example_of_an_init_container_is_a_command_of_ours() -> None:
    init = next(container for container in containers(example()) if container["name"] == "interceptor-init")
    done = subprocess.run(
        [sys.executable, "-m", "interceptor", "plan", *init["args"][1:]], capture_output=True, text=True, check=False
    )
    assert (init["args"][0], done.returncode) == ("init", 0), done.stderr


def test_the_plain_manifest_is_the_chart() -> None:
    assert MANIFEST.read_text() == manifest(), "run `make manifests`"
