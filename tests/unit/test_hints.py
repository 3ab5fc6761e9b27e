"""A refusal by nft or iptables names what the kernel lacks."""

from __future__ import annotations

import pytest

from interceptor.backends.hints import explained
from interceptor.errors import BackendError, ConfigError, InterceptorError, Unsupported

# As nft 1.0.6 and iptables 1.8.9 print them.
NFT = "/dev/stdin:9:3-70: Error: Could not process rule: {why}\n\t\t{rule}\n\t\t^^^^^^^^\n"


@pytest.mark.parametrize(
    ("stderr", "feature", "option"),
    [
        pytest.param(
            NFT.format(why="No such file or directory", rule="counter redirect to :15001"),
            "NAT",
            "CONFIG_NFT_REDIR",
            id="nft nat",
        ),
        pytest.param(
            NFT.format(why="No such file or directory", rule="counter tproxy to :15006"),
            "TPROXY",
            "CONFIG_NFT_TPROXY",
            id="nft tproxy",
        ),
        pytest.param("Couldn't load match `owner':No such file or directory", "uid", "XT_MATCH_OWNER", id="no xt_owner"),
        pytest.param(
            "iptables-legacy-restore: unable to initialize table 'nat': Table does not exist", "NAT", "NF_NAT", id="no nat"
        ),
    ],
)
def test_missing_kernel_part_is_named(stderr: str, feature: str, option: str) -> None:
    error = explained("loading rules", "nft", 1, stderr)

    assert isinstance(error, Unsupported)
    assert feature in str(error)
    assert option in str(error)


@pytest.mark.parametrize(
    ("stderr", "wanted"),
    [
        pytest.param("Error: Could not process rule: Operation not permitted", "CAP_NET_ADMIN", id="no capability"),
        pytest.param("", "no message", id="silent"),
        pytest.param("Error: syntax error, unexpected string", "syntax error", id="anything else"),
    ],
)
def test_other_refusals_are_backend_errors(stderr: str, wanted: str) -> None:
    error: InterceptorError = explained("loading rules", "nft", 1, stderr)

    assert isinstance(error, BackendError)
    assert wanted in str(error)


def test_a_cgroup_that_is_not_there_is_the_options_fault() -> None:
    # As nft 1.0.6 says it, for two rules.
    stderr = "".join(
        f"/dev/stdin:{line}:27-38: Error: cgroupv2 path fails: No such file or directory\n"
        '\t\tsocket cgroupv2 level 2 "nonexist/x" counter goto nat_proxy\n\t\t         ^^^^^^^^^^^^\n'
        for line in (31, 53)
    )

    error = explained("loading the nft table", "nft", 1, stderr)

    assert (type(error), error.exit_code) == (ConfigError, 2)
    assert str(error).startswith("--proxy-cgroup: 'nonexist/x': there is no such cgroup v2 below /sys/fs/cgroup")
    assert len(str(error).splitlines()) == 1
