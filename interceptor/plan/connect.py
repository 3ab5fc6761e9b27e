"""Outbound capture when a socket is connected: the decision of outbound.py, with the destination's address rewritten.

Only TCP: datagrams, DNS among them, stay with the rules.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from interceptor.config import Config
from interceptor.plan import outbound as out
from interceptor.plan.model import Chain, ConnectCapture, Hook, HostFacts, Jump, Match, Return, Rewrite, Rule, Table
from interceptor.values import Family, Network, Proto

# The kernel takes connect(0.0.0.0) and connect(::) for loopback (net/ipv4/route.c, net/ipv6/tcp_ipv6.c).
ITSELF: tuple[Network, ...] = (*out.LOOPBACK, ipaddress.ip_network("0.0.0.0/32"), ipaddress.ip_network("::/128"))


def connect_capture(config: Config, facts: HostFacts, covered: tuple[Family, ...]) -> ConnectCapture:
    """What `--outbound connect` means on a host with these `facts`."""
    capturing = out.Capturing(
        Table.CONNECT,
        (Proto.TCP,),
        "TO_OUTBOUND",
        skip_dns=config.dns != "off",
        resolvers=facts.resolvers if config.dns == "resolv-conf" else None,
    )
    entry = tuple(
        Rule(Match(family=family, proto=Proto.TCP), Jump("OUTBOUND"), "outbound", "--outbound connect")
        for family in (covered if len(covered) == 1 else (None,))
    )
    to_proxy = Rule(
        Match(proto=Proto.TCP), Rewrite(config.outbound_port), f"to the proxy's port {config.outbound_port}", "--outbound-port"
    )
    chains = (
        Chain(Table.CONNECT, "CONNECT", entry, Hook.CONNECT),
        *(_tcp_only(chain) for chain in out.local_chains(config, capturing, "PROXY", "OUTBOUND")),
        # What it sends to its own pod is inbound traffic, for the rules to decide.
        Chain(Table.CONNECT, "PROXY", (Rule(Match(), Return(), "the proxy connects where it wants to", "built in"),)),
        Chain(Table.CONNECT, "TO_OUTBOUND", (to_proxy,)),
    )
    # ::6 is there or not, by our own doing: either way it is this namespace's.
    own = tuple(dict.fromkeys((*ITSELF, *out.INBOUND_SOURCE, *facts.own_addresses)))
    return ConnectCapture(chains, config.capture_cgroup or facts.pod_cgroup, own, facts.source)


def _tcp_only(chain: Chain) -> Chain:
    return replace(chain, rules=tuple(rule for rule in chain.rules if rule.match.proto is not Proto.UDP))
