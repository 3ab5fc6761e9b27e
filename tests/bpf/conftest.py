"""These tests load programs: they need root, and fail without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interceptor.netns import entered
from tests.rig.net import Pod, pods


@pytest.fixture
def pod() -> Iterator[Pod]:
    """A namespace of its own, entered."""
    with pods(1) as (made,), entered(made.path):
        yield made
