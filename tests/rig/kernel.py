"""What the kernel holds in a pod, as text that can be compared; and rules that are not ours."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass

from tests.rig.net import Pod

# Said by who runs the tests where iptables is left out on purpose; else its absence is an error, and with it its presence.
NFT_ONLY = "NFT_ONLY" in os.environ
if NFT_ONLY and shutil.which("iptables"):
    raise RuntimeError("NFT_ONLY is set, and iptables is installed: its rules would not be looked at")
SAVES = () if NFT_ONLY else tuple(f"{ip}tables-{kind}-save" for kind in ("nft", "legacy") for ip in ("ip", "ip6"))
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
    """Everything that capture touches, with the counters of rules. A table without rules and chains counts as nothing."""
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


@dataclass(frozen=True, slots=True)
class Written:
    """Every rule with its handle and every counter, of nft and both iptables: a rewrite changes them, even to the same."""

    rules: str
    counters: tuple[int, ...]

    def is_untouched_in(self, later: Written) -> bool:
        """Whether `later` holds the same rules, never written again: counters may have grown and none began anew."""
        pairs = zip(self.counters, later.counters, strict=False)
        return self.rules == later.rules and all(now >= then for then, now in pairs)


def written(pod: Pod) -> Written:
    """What stands in the pod's rule tables now."""
    text = "\n".join([pod.run("nft", "-a", "list", "ruleset"), *(pod.run(program, "-c") for program in SAVES)])
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    counters = tuple(int(number) for counter in _COUNTERS.findall(text) for number in re.findall(r"\d+", counter))
    return Written(_COUNTERS.sub("0", text), counters)


def forget_connections(pod: Pod) -> None:
    """Empty the pod's conntrack table, every zone."""
    with suppress(AssertionError):
        pod.run("conntrack", "-F")
