"""The chart as helm would render it, by Go's template engine; and its defaults written out as a plain manifest."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/chart"
MANIFEST = ROOT / "deploy/manifests/cni.yaml"
HEADER = "# What deploy/chart gives with its defaults in kube-system; written by `make manifests`, for clusters without Helm.\n"


def values() -> dict[str, Any]:
    """The chart's defaults."""
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values as helm merges them: objects by key, all else replaced."""
    found = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def render(changes: Mapping[str, Any] | None = None, namespace: str = "kube-system") -> list[dict[str, Any]]:
    """The objects that the chart gives with `changes` to its values."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    context = {
        "Values": merged(values(), changes or {}),
        "Release": {"Name": "interceptor", "Namespace": namespace, "Service": "Helm"},
        "Chart": {"Name": chart["name"], "Version": chart["version"], "AppVersion": chart["appVersion"]},
    }
    done = subprocess.run(
        ["go", "run", str(Path(__file__).parent / "render.go"), str(CHART)],
        input=json.dumps(context),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,  # the first compiles the standard library
    )
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def manifest() -> str:
    """The text of MANIFEST."""
    return HEADER + "---\n".join(yaml.safe_dump(found, sort_keys=False, width=120) for found in render())


if __name__ == "__main__":
    MANIFEST.write_text(manifest())
