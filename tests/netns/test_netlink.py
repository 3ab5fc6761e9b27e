"""Sockets and lists that are kept for a run: nothing that we, or a program of ours, have changed is shown as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interceptor import netns
from interceptor.backends import address, netlink, nft_table, process, routes
from interceptor.backends.nf_tables import NFNL_SUBSYS_NFTABLES, NFT_MSG_DELTABLE
from interceptor.plan.model import PolicyRoute
from interceptor.values import Family, Mark
from tests.rig.net import pods

ROUTE = PolicyRoute(Family.V4, Mark(0x539), 1337)


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    with pods(1) as (pod,), netns.entered(pod.path), netlink.kept():
        yield


def test_what_we_change_is_listed_anew() -> None:
    assert address.inbound_source_state() == "absent"

    address.add_inbound_source()

    assert address.inbound_source_state() == "ours"


def test_what_a_library_changes_for_us_is_listed_anew() -> None:
    assert routes.present() == ()

    routes.ensure((ROUTE,))

    assert routes.present() == (ROUTE,)


def test_what_a_program_of_ours_changes_is_listed_anew() -> None:
    assert not nft_table.exists()

    process.run_checked(("nft", "-f", "-"), stdin="table inet interceptor\n", doing="loading")
    assert nft_table.exists()

    nft_table.delete()
    assert not nft_table.exists()


def test_a_refusal_leaves_no_answer_for_the_next_request() -> None:
    no_such = netlink.Message(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE, b"\1\0\0\0")
    for _ in range(3):
        with pytest.raises(OSError, match="Invalid argument"):
            netlink.request(netlink.NETLINK_NETFILTER, [no_such, no_such])

        assert not nft_table.exists()
        assert routes.present() == ()


def test_another_run_within_a_run_is_of_its_own_namespace() -> None:
    process.run_checked(("nft", "-f", "-"), stdin="table inet interceptor\n", doing="loading")
    assert nft_table.exists()

    with pods(1) as (other,), netns.entered(other.path), netlink.kept():
        assert not nft_table.exists()

    assert nft_table.exists()


def test_another_namespace_is_not_asked_by_sockets_of_the_first() -> None:
    address.add_inbound_source()
    with pods(1) as (other,), netns.entered(other.path):
        assert address.inbound_source_state() == "absent"
        with netlink.kept():
            assert address.inbound_source_state() == "absent"
        with netns.thrown_away():
            assert address.inbound_source_state() == "absent"
    assert address.inbound_source_state() == "ours"
