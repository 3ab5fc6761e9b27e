"""Capture in a pod, with options written as a user writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from interceptor import capture
from interceptor.config import FIELD, Config, Names
from tests.rig.net import Pod

Capture: TypeAlias = Callable[..., None]
NAMES = Names(uid={"root": 0}.__getitem__, gid={"root": 0}.__getitem__)


def options(**texts: str) -> Config:
    """The Config for these options' texts: options(dns="all", exclude_outbound_ports="80,443")."""
    return Config(**{name: FIELD[name].kind.parse(text, NAMES) for name, text in texts.items()})


def enable(pod: Pod, **texts: str) -> capture.Report:
    """Capture in `pod`."""
    return capture.enable(options(**texts), netns=pod.name)


@contextmanager
def capturing(pod: Pod, **texts: str) -> Iterator[capture.Report]:
    """Captured within the block."""
    try:
        yield enable(pod, **texts)
    finally:
        capture.disable(netns=pod.name)
