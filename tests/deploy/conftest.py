"""These need Go, Kubernetes' schemas and, for the image, buildah: `make deploy` runs them."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/deploy/" in str(item.path):
            item.add_marker("deploy")
