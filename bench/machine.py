"""What a reader has to know of the machine; nothing that names it."""

from __future__ import annotations

import os
import platform
import re
import resource

from bench.contenders import Contender, version
from bench.world import SYSCTLS, run


def description(contenders: list[Contender]) -> list[str]:
    """Lines of Markdown."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    with open("/proc/meminfo", encoding="ascii") as file:
        memory_gb = int(file.readline().split()[1]) / 1e6
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    versions = {each.kind: version(each) for each in contenders if each.kind != "none"}
    return [
        f"- {os.cpu_count()} CPUs, {model}, {memory_gb:.0f} GB; Linux {re.match(r'[0-9.]+', platform.release()).group()}",  # type: ignore[union-attr]
        f"- {'; '.join(versions.values())}",
        f"- load: {_generators()}",
        f"- RLIMIT_NOFILE {soft} of {hard}; {', '.join(f'{key} = {value}' for key, value in SYSCTLS.items())}",
    ]


def _generators() -> str:
    nft = run("nft", "--version").split(" (")[0].strip()
    iperf3 = run("iperf3", "--version").splitlines()[0].split(" (")[0]
    return f"{iperf3}, wrk, nginx; rules by {nft}"
