"""Every case renders as its golden files say. A diff is reviewed like code; `make golden` writes them anew."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import fields

import pytest

from interceptor.config import Config
from interceptor.proxy_options import ProxyOptions
from tests.golden.cases import CASES, HERE, rendered


@pytest.mark.parametrize("name", CASES)
def test_case_renders_as_its_golden_files(name: str) -> None:
    for path, text in rendered(name):
        assert text == path.read_text(), path.name


def test_no_golden_file_is_left_of_a_case_that_is_gone() -> None:
    wanted = {path for name in CASES for path, _ in rendered(name)}

    assert {*HERE.glob("*.nft"), *HERE.glob("*.restore"), *HERE.glob("*.connect")} == wanted


@pytest.mark.parametrize(
    "name", sorted({field.name for field in fields(Config)} - {field.name for field in fields(ProxyOptions)})
)
def test_some_case_gives_the_option_a_value_of_its_own(name: str) -> None:
    assert {getattr(config, name) for config in CASES.values()} - {getattr(Config(), name)}


# nft looks a cgroup's path up, so it must exist; tests/netns has one.
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].proxy_cgroup is None])
@pytest.mark.skipif(shutil.which("unshare") is None or shutil.which("nft") is None, reason="needs nft and unshare")
def test_nft_accepts_the_golden_file(name: str) -> None:
    # In a user and network namespace of its own: needs no root, and nothing is written anyway.
    argv = ["unshare", "-rn", "nft", "--check", "-f", str(HERE / f"{name}.nft")]
    checked = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert (checked.returncode, checked.stderr) == (0, "")
