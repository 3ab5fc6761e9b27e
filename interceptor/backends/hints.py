"""What a refusal by nft or iptables means: which parts of the kernel are missing, and what to do. Pure text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

from interceptor.errors import BackendError, ConfigError, InterceptorError, Problem, Unsupported

# What a program says when the kernel lacks a part, as opposed to when it is told nonsense.
MISSING_PART = re.compile(
    "No such file or directory|Operation not supported|Protocol not supported|Address family not supported"
    "|No chain/target/match by that name|can't initialize|Couldn't load|Extension|Table does not exist|unable to initialize",
    re.IGNORECASE,
)
NEEDS_NET_ADMIN = "Needs CAP_NET_ADMIN in this network namespace: run as root, or give the container NET_ADMIN"
NOT_PERMITTED = ("Operation not permitted", "Permission denied", "you must be root")
# nft looks the path up itself, and shows the rule on the next line.
NO_SUCH_CGROUP = re.compile(
    r'cgroupv2 path fails: No such file or directory\s.*?socket cgroupv2 level \d+ "([^"]*)"', re.DOTALL
)
SHOWN = 300  # characters of what the program said: nft names each refused rule, and iptables prints its usage


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the kernel: what a refusal says (a regular expression), what it is, where it is, how to do without."""

    says: str
    feature: str
    needs: str
    otherwise: str = ""


NO_TIMEOUTS = "use --no-conntrack-timeouts, at a price (docs/decisions/0002-conntrack-bypass.md)"
NO_TPROXY = "use redirect for TCP (--inbound, --outbound) and leave UDP alone (--udp off)"
OTHER_NAT = "use --backend iptables-legacy, if the kernel has NAT for that"
BUILT_IN_OWNER = "use --backend nft, which has it built in"
OTHER_LEGACY = "use --backend nft or iptables-nft"
# Where two stand in one place the one further right counts, then the one further up.
NFT_PARTS = (
    Part(
        "cgroupv2",
        "matching cgroups",
        "Linux 5.13, CONFIG_NFT_SOCKET and CONFIG_SOCK_CGROUP_DATA",
        "name the proxy by --proxy-uid, --proxy-gid or --proxy-mark",
    ),
    Part("tproxy", "TPROXY", "CONFIG_NFT_TPROXY (module nft_tproxy)", NO_TPROXY),
    Part("socket", "TPROXY's match for sockets", "CONFIG_NFT_SOCKET (module nft_socket)", NO_TPROXY),
    Part(
        "ct timeout", "conntrack timeout policies", "CONFIG_NFT_CT and CONFIG_NF_CONNTRACK_TIMEOUT (module nft_ct)", NO_TIMEOUTS
    ),
    Part("zone", "conntrack zones", "CONFIG_NFT_CT and CONFIG_NF_CONNTRACK_ZONES (module nft_ct)"),
    Part("ct ", "matching connections", "CONFIG_NFT_CT (module nft_ct)"),
    Part("fib ", "asking the routing table", "CONFIG_NFT_FIB_INET (module nft_fib_inet)"),
    Part("redirect", "NAT", "CONFIG_NFT_NAT and CONFIG_NFT_REDIR (modules nft_chain_nat, nft_redir)", OTHER_NAT),
    Part("nat", "NAT", "CONFIG_NFT_NAT and CONFIG_NFT_REDIR (modules nft_chain_nat, nft_redir)", OTHER_NAT),
    Part("log ", "logging", "CONFIG_NFT_LOG (module nft_log)", "leave --log-rules out"),
)
CT_TIMEOUT = Part(
    "--timeout", "conntrack timeout policies", "CONFIG_NF_CT_NETLINK_TIMEOUT (module nfnetlink_cttimeout)", NO_TIMEOUTS
)
IPTABLES_PARTS = (
    Part(r"\bip_tables|\biptables who", "iptables-legacy's tables", "CONFIG_IP_NF_IPTABLES (module ip_tables)", OTHER_LEGACY),
    Part(
        r"\bip6_tables|\bip6tables who",
        "iptables-legacy's IPv6 tables",
        "CONFIG_IP6_NF_IPTABLES (module ip6_tables)",
        OTHER_LEGACY,
    ),
    Part("TPROXY", "TPROXY", "CONFIG_NETFILTER_XT_TARGET_TPROXY (module xt_TPROXY)", NO_TPROXY),
    Part("socket", "TPROXY's match for sockets", "CONFIG_NETFILTER_XT_MATCH_SOCKET (module xt_socket)", NO_TPROXY),
    Part("owner", "matching the sender's uid", "CONFIG_NETFILTER_XT_MATCH_OWNER (module xt_owner)", BUILT_IN_OWNER),
    CT_TIMEOUT,
    Part(
        "Extension CT ",
        "setting connections' zones and timeouts",
        "CONFIG_NETFILTER_XT_TARGET_CT (module xt_CT)",
        f"use --backend nft, or {NO_TIMEOUTS}",
    ),
    Part("zone", "conntrack zones", "CONFIG_NF_CONNTRACK_ZONES"),
    Part("addrtype", "asking the routing table", "CONFIG_NETFILTER_XT_MATCH_ADDRTYPE (module xt_addrtype)"),
    Part("multiport", "lists of ports", "CONFIG_NETFILTER_XT_MATCH_MULTIPORT (module xt_multiport)"),
    Part(
        r"\brecent\b",
        "noting that the proxy is ready",
        "CONFIG_NETFILTER_XT_MATCH_RECENT (module xt_recent)",
        "use --backend nft, or --before-proxy block",
    ),
    Part("connmark", "connection marks", "CONFIG_NETFILTER_XT_CONNMARK (module xt_connmark)"),
    Part("REDIRECT", "NAT", "CONFIG_NETFILTER_XT_TARGET_REDIRECT and CONFIG_NF_NAT (modules xt_REDIRECT, nf_nat)"),
    Part(
        r"nat'|initialize nat:",
        "NAT",
        "CONFIG_NF_NAT and CONFIG_IP_NF_NAT (modules nft_chain_nat, or iptable_nat and ip6table_nat)",
    ),
    Part(
        r"raw'|initialize raw:",
        "the raw table",
        "CONFIG_IP_NF_RAW and CONFIG_IP6_NF_RAW (modules iptable_raw, ip6table_raw)",
        NO_TIMEOUTS,
    ),
    Part(
        "mangle'", "the mangle table", "CONFIG_IP_NF_MANGLE and CONFIG_IP6_NF_MANGLE (modules iptable_mangle, ip6table_mangle)"
    ),
)
# What is refused together for one reason.
CONNTRACK = Part("", "connection tracking", "CONFIG_NF_CONNTRACK (module nf_conntrack), on which NAT and the rest stand")
_IS_CONNTRACK = {"NAT", "conntrack timeout policies"}


def explained(doing: str, program: str, status: int, stderr: str) -> InterceptorError:
    """The error for a refused run of `program`: Unsupported when the kernel lacks something, else BackendError.

    ConfigError for what only the kernel could tell of an option's value.
    """
    if no_cgroup := NO_SUCH_CGROUP.search(stderr):
        expected = "there is no such cgroup v2 below /sys/fs/cgroup, as seen from here; make it before the rules"
        return ConfigError([Problem("--proxy-cgroup", no_cgroup[1], expected)])
    said = f"{program} exit {status}: {_shown(stderr)}"
    if any(text in stderr for text in NOT_PERMITTED):
        return BackendError(f"{doing}: {said}. {NEEDS_NET_ADMIN}")
    lacking = _lacking(stderr) if MISSING_PART.search(stderr) else []
    if not lacking:
        return BackendError(f"{doing}: {said}")
    return Unsupported(f"{doing}: {lacks(lacking)} ({said})")


def lacks(parts: Sequence[Part]) -> str:
    """The message for a kernel without `parts`: what, where it is found, what to do."""
    features = {part.feature for part in parts}
    if features >= _IS_CONNTRACK:
        parts = (CONNTRACK,)
    names = " and ".join(part.feature for part in parts)
    ways = ["modprobe on the host", *dict.fromkeys(part.otherwise for part in parts if part.otherwise)]
    return f"this kernel lacks {names}: it needs {'; '.join(part.needs for part in parts)}. Try {', or '.join(ways)}"


def _lacking(stderr: str) -> list[Part]:
    """Each missing feature once. nft names all that is refused; iptables stops at the first, and what it adds is noise."""
    by_nft = {part.feature: part for text in _refused_by_nft(stderr) for part in _rightmost(NFT_PARTS, text)}
    if by_nft:
        return list(by_nft.values())
    return [part for line in stderr.splitlines() for part in IPTABLES_PARTS if re.search(part.says, line)][:1]


def _refused_by_nft(stderr: str) -> Iterator[str]:
    """Of each refused line of the script what stands before the end of nft's ^^^^ marks, which point at the expression."""
    for line, marks in pairwise(stderr.splitlines()):
        if "^" in marks and not marks.strip(" \t^~"):
            yield line[: marks.rindex("^") + 1]


def _rightmost(parts: Sequence[Part], text: str) -> list[Part]:
    found = [(found.end(), part) for part in parts for found in re.finditer(part.says, text)]
    return [max(found, key=itemgetter(0))[1]] if found else []


def _shown(stderr: str) -> str:
    text = " / ".join(line.strip() for line in stderr.splitlines() if line.strip(" \t^~")) or "no message"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
