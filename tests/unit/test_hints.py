"""A refusal by nft or iptables names what the kernel lacks. The texts are those of kernels that really lack it."""

from __future__ import annotations

import pytest

from interceptor.backends.hints import SHOWN, explained
from interceptor.errors import BackendError, ConfigError, Unsupported

# As nft 1.0.6 prints them: the message, the line of the script, and marks under what was refused.
TABLE_NAT = """\
/dev/stdin:80:8-10: Error: No such file or directory; did you mean chain ‘nat_output’ in table inet ‘interceptor’?
\t\ttype nat hook output priority -101; policy accept;
\t\t     ^^^
"""
REDIRECT = """\
/dev/stdin:72:28-35: Error: Could not process rule: No such file or directory
\t\tmeta l4proto tcp counter redirect to :15001 comment "to the proxy's port 15001"
\t\t                         ^^^^^^^^
"""
CT_TIMEOUT = """\
/dev/stdin:4:13-16: Error: Could not process rule: No such file or directory
\tct timeout itu4 {
\t           ^^^^
"""
NFT_TPROXY = """\
/dev/stdin:90:78-93: Error: Could not process rule: No such file or directory
\t\tmeta l4proto tcp counter meta mark set meta mark & 0xfffff539 | 0x00000539 tproxy to :15006 accept comment "nat zone"
\t\t                                                                           ^^^^^^^^^^^^^^^^
"""
# As iptables 1.8.9 prints them.
NFT_REDIRECT = """\
Warning: Extension REDIRECT revision 0 not supported, missing kernel module?
iptables-nft-restore v1.8.9 (nf_tables):
line 27: CHAIN_ADD failed (No such file or directory): chain OUTPUT
line 40: RULE_APPEND failed (No such file or directory): rule in chain INTERCEPT_TO_OUTBOUND
"""
LEGACY_NAT = """\
iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'nat'

Error occurred at line: 14
Try `iptables-restore -h' or 'iptables-restore --help' for more information.
"""
OWNER = """\
Warning: Extension owner revision 0 not supported, missing kernel module?
Warning: Extension owner is not supported, missing kernel module?
iptables-restore: line 13 failed
"""
XT_CT = """\
Warning: Extension CT revision 0 not supported, missing kernel module?
iptables-restore v1.8.9 (legacy): unknown option "--timeout"
Error occurred at line: 10
Try `iptables-restore -h' or 'iptables-restore --help' for more information.
"""
NO_LEGACY = """\
modprobe: FATAL: Module ip_tables not found in directory /lib/modules/6.1.0-50-amd64
iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'raw'
Error occurred at line: 1
Try `iptables-restore -h' or 'iptables-restore --help' for more information.
"""
# As python-iptables 1.2.0 says them.
PYTHON_NO_LEGACY = "IPTCError: can't initialize raw: b'iptables who? (do you need to insmod?)'"
PYTHON_NAT = "IPTCError: can't initialize nat: b'Table does not exist (do you need to insmod?)'"


@pytest.mark.parametrize(
    ("stderr", "feature", "needs", "otherwise"),
    [
        pytest.param(TABLE_NAT + REDIRECT, "NAT", "nft_chain_nat", "--backend iptables-legacy", id="nft: NAT"),
        pytest.param(CT_TIMEOUT, "conntrack timeout policies", "nft_ct", "--no-conntrack-timeouts", id="nft: ct timeout"),
        pytest.param(CT_TIMEOUT + REDIRECT, "connection tracking", "nf_conntrack", "modprobe", id="nft: conntrack"),
        pytest.param(NFT_TPROXY, "TPROXY", "nft_tproxy", "redirect", id="nft: TPROXY, whatever else stands in the line"),
        pytest.param(NFT_REDIRECT, "NAT", "xt_REDIRECT", "modprobe", id="iptables-nft: NAT"),
        pytest.param(LEGACY_NAT, "NAT", "iptable_nat", "modprobe", id="iptables-legacy: NAT"),
        pytest.param(OWNER, "matching the sender's uid", "xt_owner", "--backend nft", id="iptables: owner"),
        pytest.param(
            XT_CT, "setting connections' zones and timeouts", "xt_CT", "--no-conntrack-timeouts", id="iptables: the CT target"
        ),
        pytest.param(NO_LEGACY, "iptables-legacy's tables", "ip_tables", "--backend nft", id="iptables-legacy: any table"),
        pytest.param(PYTHON_NO_LEGACY, "iptables-legacy's tables", "ip_tables", "--backend nft", id="libiptc: any table"),
        pytest.param(PYTHON_NAT, "NAT", "iptable_nat", "modprobe", id="libiptc: NAT"),
    ],
)
def test_missing_kernel_part_is_named(stderr: str, feature: str, needs: str, otherwise: str) -> None:
    error = explained("loading rules", "program", 1, stderr)

    assert isinstance(error, Unsupported)
    assert str(error).startswith(f"loading rules: this kernel lacks {feature}: it needs ")
    assert [text for text in (needs, otherwise) if text not in str(error)] == []


def test_all_missing_parts_are_named_at_once() -> None:
    message = str(explained("loading rules", "nft", 1, NFT_TPROXY + CT_TIMEOUT))

    assert (
        "lacks TPROXY and conntrack timeout policies: it needs CONFIG_NFT_TPROXY (module nft_tproxy); CONFIG_NFT_CT" in message
    )


def test_a_long_refusal_is_cut() -> None:
    message = str(explained("loading rules", "nft", 1, NFT_TPROXY * 20))

    assert len(message) < SHOWN + 400
    assert "/dev/stdin:90" in message


@pytest.mark.parametrize(
    ("stderr", "wanted"),
    [
        pytest.param("Error: Could not process rule: Operation not permitted", "CAP_NET_ADMIN", id="no capability"),
        pytest.param("", "no message", id="silent"),
        pytest.param("Error: syntax error, unexpected string", "syntax error", id="anything else"),
    ],
)
def test_other_refusals_are_backend_errors(stderr: str, wanted: str) -> None:
    error = explained("loading rules", "nft", 1, stderr)

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
