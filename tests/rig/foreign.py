"""Rules that are not ours: another program's, and those that meshes write today."""

from __future__ import annotations

from tests.rig.kernel import NFT_ONLY
from tests.rig.net import Pod
from tests.rig.world import OUTBOUND, PORTS

COUNTED, DROPPED = 8080, 9090
assert {COUNTED, DROPPED} <= set(PORTS)

_NFT = f"""
table inet foreign {{
  chain out {{
    type filter hook output priority 0; policy accept;
    tcp dport {COUNTED} counter comment "foreign"
    tcp dport {DROPPED} counter drop
  }}
}}
"""
# Beside ours in every table that we use, with a name that begins like ours.
_TABLES = f"""
*raw
:INTERCEPTED_BY_ME - [0:0]
-A OUTPUT -p tcp -m tcp --dport {COUNTED} -m comment --comment foreign -j INTERCEPTED_BY_ME
COMMIT
*mangle
-A OUTPUT -p tcp -m tcp --dport {COUNTED} -m comment --comment foreign -j ACCEPT
COMMIT
*nat
:FOREIGN - [0:0]
-A PREROUTING -p tcp -m tcp --dport 1 -j FOREIGN
-A FOREIGN -p tcp -j REDIRECT --to-ports 2
COMMIT
*filter
-A OUTPUT -p tcp -m tcp --dport {DROPPED} -m comment --comment foreign -j DROP
COMMIT
"""
RESTORES = {
    "nft": (),
    "iptables-nft": ("iptables-nft-restore", "ip6tables-nft-restore"),
    "iptables-legacy": ("iptables-legacy-restore", "ip6tables-legacy-restore"),
    "libiptc": ("iptables-legacy-restore", "ip6tables-legacy-restore"),
}


def add_foreign_rules(pod: Pod) -> None:
    """Someone else's rules, in nftables and in both kinds of iptables tables."""
    pod.run("nft", "-f", "-", stdin=_NFT)
    for program in () if NFT_ONLY else (*RESTORES["iptables-nft"], *RESTORES["iptables-legacy"]):
        pod.run(program, "--noflush", stdin=_TABLES)


def add_mesh_rules(pod: Pod, backend: str, direct_uid: int) -> None:
    """Outbound capture as Istio, Linkerd and Kuma write it, reduced to its two decisions."""
    if backend == "nft":
        lines = ("type nat hook output priority -100;", f"meta skuid {direct_uid} return", "oifname lo return")
        chain = "\n".join((*lines, f"meta l4proto tcp redirect to :{OUTBOUND}"))
        pod.run("nft", "-f", "-", stdin=f"table inet mesh {{\nchain out {{\n{chain}\n}}\n}}\n")
    for program in RESTORES[backend]:
        owner, loopback = f"-m owner --uid-owner {direct_uid}", "-o lo"
        returns = "".join(f"-A OUTPUT {match} -j RETURN\n" for match in (owner, loopback))
        pod.run(program, "--noflush", stdin=f"*nat\n{returns}-A OUTPUT -p tcp -j REDIRECT --to-ports {OUTBOUND}\nCOMMIT\n")


def remove_mesh_rules(pod: Pod, backend: str) -> None:
    """Take them away again."""
    if backend == "nft":
        pod.run("nft", "delete", "table", "inet", "mesh")
    for program in RESTORES[backend]:
        pod.run(program, "--noflush", stdin="*nat\n-F OUTPUT\nCOMMIT\n")
