"""Machines whose kernel or userland lacks something, and what `init` must do on each: the table of guest/test_variant.py."""

from __future__ import annotations

from dataclasses import dataclass

OK, USAGE, UNSUPPORTED = 0, 2, 6  # docs/exit-codes.md
TPROXY = "--inbound tproxy --outbound tproxy --udp tproxy"


@dataclass(frozen=True, slots=True)
class Case:
    """`init OPTIONS` ends with `status`; then `backend` holds the rules, or the message has all of `says`."""

    options: str
    status: int
    backend: str = ""
    says: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.options or "default"


@dataclass(frozen=True, slots=True)
class Variant:
    """What the machine lacks: modules and programs by pattern; `append` goes to the kernel's command line."""

    cases: tuple[Case, ...]
    without_modules: tuple[str, ...] = ()
    without_files: tuple[str, ...] = ()
    append: str = ""


def works(backend: str, options: str = "") -> Case:
    """`init` chooses `backend`; check, probe with real packets, and clean succeed."""
    return Case(options, OK, backend)


def lacks(options: str, *says: str) -> Case:
    """`init` says what this kernel has not got, and leaves everything as it was."""
    return Case(options, UNSUPPORTED, says=says)


IPTABLES = ("--backend iptables-nft", "--backend iptables-legacy")
ALL_WORK = (
    works("nft"),
    works("nft", TPROXY),
    works("iptables-nft", IPTABLES[0]),
    works("iptables-legacy", IPTABLES[1]),
)
VARIANTS = {
    "no-nat": Variant(
        (
            lacks("", "lacks NAT:", "nft_chain_nat", "--backend iptables-legacy"),
            lacks(TPROXY, "lacks NAT:"),
            lacks(IPTABLES[0], "lacks NAT:", "xt_REDIRECT", "rules were put back"),
            lacks(IPTABLES[1], "lacks NAT:", "iptable_nat", "rules were put back"),
        ),
        without_modules=("nf_nat",),
    ),
    # NAT is there for iptables-legacy alone: nothing is chosen behind the user's back, and the message names the way.
    "no-nft-nat": Variant(
        (
            lacks("", "lacks NAT:", "nft_chain_nat", "--backend iptables-legacy"),
            works("iptables-legacy", IPTABLES[1]),
        ),
        without_modules=("nft_chain_nat", "nft_redir", "nft_nat"),
    ),
    "no-tproxy": Variant(
        (
            works("nft"),
            lacks(TPROXY, "lacks TPROXY:", "nft_tproxy", "redirect"),
            lacks(f"{TPROXY} {IPTABLES[0]}", "lacks TPROXY:", "xt_TPROXY"),
            lacks(f"{TPROXY} {IPTABLES[1]}", "lacks TPROXY:", "xt_TPROXY"),
        ),
        without_modules=("nf_tproxy_ipv4", "nf_tproxy_ipv6"),
    ),
    "no-owner": Variant(
        (
            works("nft"),
            lacks(IPTABLES[0], "lacks matching the sender's uid:", "xt_owner", "--backend nft"),
            lacks(IPTABLES[1], "lacks matching the sender's uid:", "xt_owner", "--backend nft"),
        ),
        without_modules=("xt_owner",),
    ),
    "no-conntrack": Variant(
        (
            lacks("", "lacks connection tracking:", "nf_conntrack"),
            lacks(TPROXY, "lacks connection tracking"),
            lacks(IPTABLES[0], "lacks connection tracking:", "nf_conntrack"),
            lacks(IPTABLES[1], "lacks connection tracking:", "nf_conntrack"),
        ),
        without_modules=("nf_conntrack",),
    ),
    "no-cttimeout": Variant(
        (
            works("nft"),  # nft has timeouts of its own, in nft_ct
            lacks(IPTABLES[0], "lacks conntrack timeout policies:", "nfnetlink_cttimeout", "--no-conntrack-timeouts"),
            lacks(IPTABLES[1], "lacks conntrack timeout policies:", "nfnetlink_cttimeout", "--no-conntrack-timeouts"),
            works("iptables-legacy", f"{IPTABLES[1]} --no-conntrack-timeouts"),
        ),
        without_modules=("nfnetlink_cttimeout",),
    ),
    "no-xt-ct": Variant(
        (
            works("nft"),
            lacks(IPTABLES[0], "lacks setting connections' zones and timeouts:", "xt_CT", "--no-conntrack-timeouts"),
            lacks(IPTABLES[1], "lacks setting connections' zones and timeouts:", "xt_CT", "--no-conntrack-timeouts"),
            works("iptables-nft", f"{IPTABLES[0]} --no-conntrack-timeouts"),
        ),
        without_modules=("xt_CT",),
    ),
    "no-ip6tables": Variant(
        (
            works("nft"),
            works("iptables-nft", IPTABLES[0]),
            lacks(IPTABLES[1], "lacks iptables-legacy's IPv6 tables:", "ip6_tables", "--backend nft", "rules were put back"),
        ),
        without_modules=("ip6_tables",),
    ),
    "no-nftables": Variant(
        (
            works("iptables-legacy"),
            works("iptables-legacy", TPROXY),
            Case("--backend nft", USAGE, says=("no nf_tables", "usable here: iptables-legacy")),
            Case(IPTABLES[0], USAGE, says=("no nf_tables", "usable here: iptables-legacy")),
        ),
        without_modules=("nf_tables",),
    ),
    "no-legacy-tables": Variant(
        (
            works("nft"),
            works("iptables-nft", IPTABLES[0]),
            lacks(IPTABLES[1], "lacks iptables-legacy's tables:", "ip_tables", "--backend nft"),
        ),
        without_modules=("ip_tables", "ip6_tables"),
    ),
    "ipv6-disabled": Variant(ALL_WORK, append="ipv6.disable=1"),
    "ipv6-without-addresses": Variant(
        (
            works("nft"),
            lacks(TPROXY, "IPv6 is off on lo", "--ip-family v4"),
            works("nft", f"{TPROXY} --ip-family v4"),
            works("iptables-nft", IPTABLES[0]),
            works("iptables-legacy", IPTABLES[1]),
        ),
        append="ipv6.disable_ipv6=1",
    ),
    "nft-only": Variant(
        (
            works("nft"),
            works("nft", TPROXY),
            Case(IPTABLES[0], USAGE, says=("iptables-nft-restore is not installed", "usable here: nft")),
        ),
        without_files=("/usr/sbin/*tables*",),
    ),
    "legacy-only": Variant(
        (
            works("iptables-legacy"),
            works("iptables-legacy", TPROXY),
            Case("--backend nft", USAGE, says=("nft is not installed", "usable here: iptables-legacy")),
        ),
        without_files=("/usr/sbin/nft", "/usr/sbin/*tables-nft*", "/usr/sbin/xtables-nft*"),
    ),
    "no-programs": Variant(
        (works("libiptc"), works("libiptc", TPROXY)),
        without_files=("/usr/sbin/nft", "/usr/sbin/*tables*"),
    ),
    "no-programs-no-nat": Variant(
        (lacks("", "lacks NAT:", "iptable_nat"),),
        without_modules=("nf_nat",),
        without_files=("/usr/sbin/nft", "/usr/sbin/*tables*"),
    ),
    "no-programs-no-legacy-tables": Variant(
        (lacks("", "lacks iptables-legacy's tables", "ip_tables"),),
        without_modules=("ip_tables", "ip6_tables"),
        without_files=("/usr/sbin/nft", "/usr/sbin/*tables*"),
    ),
}
