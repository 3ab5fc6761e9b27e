"""The plugin's own deadline: a request that takes too long is answered all the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from cni.deadline import within
from cni.plugin import Result

CONFIG = {"cniVersion": "1.0.0", "name": "net", "type": "interceptor-cni", "prevResult": {"ips": []}}
POD = {"CNI_CONTAINERID": "a", "CNI_NETNS": "/run/netns/a", "CNI_IFNAME": "eth0"}


@pytest.fixture
def silent() -> Iterator[int]:
    """A descriptor that nothing is ever read from."""
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def answered(command: str, silent: int, said: list[str], **keys: object) -> Result:
    def forever() -> Result:
        os.read(silent, 1)
        raise AssertionError

    return within(0.05, forever, {**POD, "CNI_COMMAND": command}, json.dumps({**CONFIG, **keys}).encode(), said.append)


@pytest.mark.parametrize("command", ["ADD", "CHECK"])
def test_what_takes_too_long_is_to_be_tried_again(silent: int, command: str) -> None:
    status, result = answered(command, silent, [])
    assert status == 1
    assert result is not None
    assert (result["code"], result["cniVersion"]) == (11, "1.0.0")


def test_a_del_that_takes_too_long_ends_well(silent: int) -> None:
    assert answered("DEL", silent, []) == (0, None)


def test_an_add_that_takes_too_long_is_let_through_where_the_entry_says_so(silent: int) -> None:
    said: list[str] = []
    assert answered("ADD", silent, said, onFailure="bypass") == (0, {"cniVersion": "1.0.0", "ips": []})
    assert "NOT captured" in said[0]
