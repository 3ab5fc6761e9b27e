"""What a refusal by nft or iptables means: which part of the kernel is missing, and what to do. Pure text."""

from __future__ import annotations

import re

from interceptor.errors import BackendError, ConfigError, InterceptorError, Problem, Unsupported

# What a program says when the kernel lacks a part, as opposed to when it is told nonsense.
MISSING_PART = (
    "No such file or directory",
    "Operation not supported",
    "Protocol not supported",
    "No chain/target/match by that name",
    "can't initialize",
    "Couldn't load",
    "Extension",
    "Table does not exist",
    "Unable to initialize",
)
NOT_PERMITTED = ("Operation not permitted", "Permission denied", "you must be root")
# nft looks the path up itself, and shows the rule on the next line.
NO_SUCH_CGROUP = re.compile(
    r'cgroupv2 path fails: No such file or directory\s.*?socket cgroupv2 level \d+ "([^"]*)"', re.DOTALL
)
CT_TIMEOUT = "CONFIG_NF_CT_NETLINK_TIMEOUT (module nfnetlink_cttimeout); --no-conntrack-timeouts does without, at a price"
# What stands in the refused rule or message -> the feature, and the kernel's options and modules for it. First match counts.
PARTS = (
    (
        "cgroupv2",
        "matching cgroups",
        "CONFIG_NFT_SOCKET and CONFIG_SOCK_CGROUP_DATA",
    ),
    ("TPROXY", "TPROXY", "CONFIG_NETFILTER_XT_TARGET_TPROXY (module xt_TPROXY)"),
    ("tproxy", "TPROXY", "CONFIG_NFT_TPROXY (module nft_tproxy)"),
    ("owner", "matching the sender's uid", "CONFIG_NETFILTER_XT_MATCH_OWNER (module xt_owner)"),
    ("ct timeout", "conntrack timeout policies", CT_TIMEOUT),
    ("--timeout", "conntrack timeout policies", CT_TIMEOUT),
    ("zone", "conntrack zones", "CONFIG_NF_CONNTRACK_ZONES"),
    ("fib ", "asking the routing table", "CONFIG_NFT_FIB_INET (module nft_fib_inet)"),
    ("addrtype", "asking the routing table", "CONFIG_NETFILTER_XT_MATCH_ADDRTYPE (module xt_addrtype)"),
    ("multiport", "lists of ports", "CONFIG_NETFILTER_XT_MATCH_MULTIPORT (module xt_multiport)"),
    ("connmark", "connection marks", "CONFIG_NETFILTER_XT_CONNMARK (module xt_connmark)"),
    ("redirect", "NAT", "CONFIG_NFT_REDIR and CONFIG_NFT_NAT (modules nft_redir, nft_chain_nat)"),
    ("REDIRECT", "NAT", "CONFIG_NETFILTER_XT_TARGET_REDIRECT (module xt_REDIRECT)"),
    ("nat", "NAT", "CONFIG_NF_NAT (modules nft_chain_nat, or iptable_nat and ip6table_nat)"),
    ("log prefix", "logging", "CONFIG_NFT_LOG (module nft_log)"),
)


def explained(doing: str, program: str, status: int, stderr: str) -> InterceptorError:
    """The error for a refused run of `program`: Unsupported when the kernel lacks something, else BackendError.

    ConfigError for what only the kernel could tell of an option's value.
    """
    if no_cgroup := NO_SUCH_CGROUP.search(stderr):
        expected = "there is no such cgroup v2 below /sys/fs/cgroup, as seen from here; make it before the rules"
        return ConfigError([Problem("--proxy-cgroup", no_cgroup[1], expected)])
    shown = " / ".join(line.strip() for line in stderr.splitlines() if line.strip(" ^~"))[:1000] or "no message"
    said = f"{doing}: {program} exit {status}: {shown}"
    if any(text in stderr for text in NOT_PERMITTED):
        return BackendError(
            f"{said}. Needs CAP_NET_ADMIN in this network namespace: run as root, or give the container NET_ADMIN"
        )
    if any(text in stderr for text in MISSING_PART):
        for text, feature, options in PARTS:
            if text in stderr:
                return Unsupported(f"{said}. This kernel lacks {feature}: it needs {options}; try modprobe on the host")
    return BackendError(said)
