"""What the kernel holds in a pod, as text that can be compared; and rules that are not ours."""

from __future__ import annotations

import re
from contextlib import suppress

from tests.rig.net import Pod

SAVES = tuple(f"{ip}tables-{kind}-save" for kind in ("nft", "legacy") for ip in ("ip", "ip6"))
STATE = (
    ("nft", "-a", "list", "ruleset"),
    ("ip", "rule"),
    ("ip", "-6", "rule"),
    ("ip", "route", "show", "table", "all"),
    ("ip", "-6", "route", "show", "table", "all"),
    ("ip", "addr"),
)
_VOLATILE = re.compile(r"^#.*\n|# handle \d+$| expires \d+sec", re.MULTILINE)
_COUNTERS = re.compile(r"packets \d+ bytes \d+|\[\d+:\d+\]")
_POLICY_COUNTERS = re.compile(r"^(:\w+ (?!- )\w+) \[\d+:\d+\]", re.MULTILINE)  # grow with any packet, even MLD


def snapshot(pod: Pod) -> dict[str, str]:
    """Everything that capture touches, with the counters of rules. Tables that hold no rule and no chain of anyone count as nothing."""
    found = {" ".join(argv): _VOLATILE.sub("", pod.run(*argv)) for argv in STATE}
    for program in SAVES:
        # Listing a legacy table creates it; save reads /proc first and lists only what is there.
        text = _VOLATILE.sub("", pod.run(program, "-c"))
        text = _POLICY_COUNTERS.sub(r"\1 [0:0]", text)
        found[program] = "".join(table for table in re.split(r"(?<=COMMIT\n)", text) if not _is_empty_table(table))
    found["nft -a list ruleset"] = "".join(
        block for block in re.split(r"(?<=^}\n)", found["nft -a list ruleset"], flags=re.MULTILINE) if not _is_empty_nft(block)
    )
    return found


def _is_empty_table(text: str) -> bool:
    return not any(line.startswith(("-", "[")) or line.endswith(" - [0:0]") for line in text.splitlines())


def _is_empty_nft(block: str) -> bool:
    # An empty base chain of iptables-nft's is the built-in chain; it counts like an empty legacy table.
    lines = [line.strip() for line in block.splitlines()]
    return not any(line and not line.startswith(("table ", "chain ", "type ", "}", "#")) for line in lines)


def handles(pod: Pod) -> str:
    """Our rules with handles and counters (nft), or with counters (iptables): a rewrite changes it, even to the same rules."""
    parts = [pod.run("nft", "-a", "list", "ruleset")]
    for program in SAVES:
        parts.append(re.sub(r"^#.*\n", "", pod.run(program, "-c"), flags=re.MULTILINE))
    return "\n".join(parts)


def without_counters(text: str) -> str:
    """`text` with every counter at nought."""
    return _COUNTERS.sub("0", text)


def forget_connections(pod: Pod) -> None:
    """Empty the pod's conntrack table, every zone."""
    with suppress(AssertionError):
        pod.run("conntrack", "-F")
