"""Limits: what is admitted, what is not, and that nothing is kept about clients that are gone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.proxy.limits import PER_CONNECTION, RESERVED, TOO_MANY, TOO_MANY_OF_CLIENT, Limits, choose_total


def test_one_too_many_is_refused_until_one_ends() -> None:
    limits = Limits(2)
    assert [limits.admit("a"), limits.admit("a"), limits.admit("b")] == [None, None, TOO_MANY]
    limits.release("a")

    assert limits.admit("b") is None


def test_a_client_that_has_its_share_leaves_room_for_others() -> None:
    limits = Limits(10, per_client=1)

    assert [limits.admit("a"), limits.admit("a"), limits.admit("b")] == [None, TOO_MANY_OF_CLIENT, None]


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60), st.integers(1, 5), st.none() | st.integers(1, 3)
)
def test_counts_are_those_of_a_list(steps: list[tuple[bool, str]], total: int, per_client: int | None) -> None:
    limits = Limits(total, per_client)
    there: list[str] = []
    for opens, client in steps:
        if opens:
            room = len(there) < total and (per_client is None or there.count(client) < per_client)
            assert (limits.admit(client) is None) == room
            there += [client] * room
        elif client in there:
            limits.release(client)
            there.remove(client)
        assert limits.open == len(there)
    for client in there:
        limits.release(client)
    assert limits._clients == {}


@pytest.mark.parametrize(
    ("wanted", "descriptors", "workers", "limit"),
    [
        (None, 1024, 1, (1024 - RESERVED) // PER_CONNECTION),
        (100, 1024, 1, 100),
        (100, 1024, 3, 34),
        (10_000, 1024, 1, (1024 - RESERVED) // PER_CONNECTION),
        (None, 10, 1, 1),
    ],
)
def test_the_limit_fits_the_descriptors(wanted: int | None, descriptors: int, workers: int, limit: int) -> None:
    assert choose_total(wanted, descriptors, workers).connections == limit


def test_a_limit_that_was_lowered_says_so() -> None:
    assert "asked for" in choose_total(10_000, 1024).reason


def test_the_descriptor_limit_is_raised_to_the_hard_one() -> None:
    program = (
        "import resource; from interceptor.proxy.limits import raise_descriptor_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))\n"
        "print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200"] * 3
