"""What is rendered, nft and iptables-restore take, and nft prints it back as it was written. In a user namespace: no root."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interceptor.config import Config
from interceptor.plan.build import build_plan
from interceptor.render import iptables, nft
from interceptor.values import Family
from tests.property.strategies import configs, facts

UNSHARE = ("unshare", "--map-root-user", "--net")


def succeeds(*argv: str) -> bool:
    try:
        return subprocess.run((*UNSHARE, *argv), capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


# The same is proved with packets in tests/netns, which fails where this cannot run.
needs_nft = pytest.mark.skipif(not succeeds("nft", "list", "ruleset"), reason="needs nft and user namespaces")
needs_iptables = pytest.mark.skipif(not succeeds("iptables-nft-save"), reason="needs iptables-nft and user namespaces")


@needs_nft
@given(data=st.data(), config=configs(proxy_cgroup=None))
def test_nft_prints_the_table_as_it_was_rendered(data: st.DataObject, config: Config) -> None:
    plan = build_plan(config, data.draw(facts(config)))
    argv = (*UNSHARE, "sh", "-c", f"nft -f - && nft --stateless --numeric-priority list table inet {nft.TABLE}")

    loaded = subprocess.run(argv, input=nft.script(plan), capture_output=True, text=True, check=False)

    assert loaded.stderr == ""
    assert nft.parse(loaded.stdout) == nft.parse(nft.table(plan))


@needs_iptables
@pytest.mark.parametrize(("family", "program"), [(Family.V4, "iptables-nft-restore"), (Family.V6, "ip6tables-nft-restore")])
@given(data=st.data(), config=configs(proxy_cgroup=None))
def test_iptables_restore_takes_the_text(family: Family, program: str, data: st.DataObject, config: Config) -> None:
    plan = build_plan(config, data.draw(facts(config)))
    text = iptables.restore(iptables.rules(plan, family), {})

    tested = subprocess.run((*UNSHARE, program, "--test"), input=text, capture_output=True, text=True, check=False)

    assert (tested.returncode, tested.stderr) == (0, "")
