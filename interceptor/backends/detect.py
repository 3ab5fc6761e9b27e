"""Which backend to use, and why. probe() reads and never writes: listing a legacy table would create it. choose() is pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from interceptor.backends import nf_tables, nft_table, process
from interceptor.errors import ConfigError, Problem, Unsupported

if TYPE_CHECKING:
    from interceptor.config import Backend

# "connect" writes no rules: for a plan that has none.
RuleBackendName = Literal["nft", "iptables-nft", "iptables-legacy", "libiptc"]
BackendName = RuleBackendName | Literal["connect"]
# In order of preference.
NAMES: tuple[RuleBackendName, ...] = ("nft", "iptables-nft", "iptables-legacy", "libiptc")
PROGRAMS: dict[BackendName, tuple[str, ...]] = {
    "nft": ("nft",),
    "iptables-nft": ("iptables-nft-restore", "iptables-nft-save", "ip6tables-nft-restore", "ip6tables-nft-save"),
    "iptables-legacy": ("iptables-legacy-restore", "iptables-legacy-save", "ip6tables-legacy-restore", "ip6tables-legacy-save"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it and no other."""

    name: BackendName
    reason: str


class Missing(Mapping[BackendName, str]):
    """For each backend that can't be used here, what is missing. A backend is looked at when it is asked for.

    `wish` is looked at thoroughly, whatever it costs.
    """

    def __init__(self, wish: Backend = "auto") -> None:
        self._wish = wish
        self._found: dict[BackendName, str | None] = {}

    def __getitem__(self, name: BackendName) -> str:
        if name not in self._found:
            self._found[name] = self._look_for_python_iptables() if name == "libiptc" else _look_for(name)
        found = self._found[name]
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[BackendName]:
        return (name for name in NAMES if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _look_for_python_iptables(self) -> str | None:
        # It is the last choice, and looking for it takes 2 ms.
        needed = (
            self._wish == "libiptc"
            or all(name in self for name in PROGRAMS)
            or ("iptables-legacy" in self and may_hold("libiptc"))
        )
        return "the Python package python-iptables is not installed" if needed and not _has_python_iptables() else None


def _look_for(name: BackendName) -> str | None:
    if name in ("nft", "iptables-nft") and not nft_table.supported():
        return "this kernel has no nf_tables (CONFIG_NF_TABLES)"
    absent = next((program for program in PROGRAMS.get(name, ()) if process.find(program) is None), None)
    return f"{absent} is not installed" if absent is not None else None


def _has_python_iptables() -> bool:
    from importlib.util import find_spec  # 2 ms

    return find_spec("iptc") is not None


def choose(wish: Backend, missing: Mapping[BackendName, str], *, needs_nft: bool) -> Choice:
    """The backend for `wish`. Raises ConfigError for a wish that can't be met, Unsupported when nothing can be used."""
    if wish != "auto":
        if wish in missing:
            usable = ", ".join(name for name in NAMES if name not in missing) or "none"
            raise ConfigError([Problem("--backend", wish, f"{missing[wish]}; usable here: {usable}")])
        return Choice(wish, "asked for with --backend")
    candidates = ("nft",) if needs_nft else NAMES
    for name in candidates:
        if name not in missing:
            passed = [f"{missing[other]}" for other in NAMES[: NAMES.index(name)]]
            return Choice(name, "; ".join(passed) or "nft is installed: one transaction for both IP families")
    if needs_nft:
        raise Unsupported(f"only nft matches --proxy-cgroup: {missing['nft']}. Install the package nftables")
    reasons = "; ".join(dict.fromkeys(missing[name] for name in candidates))
    raise Unsupported(f"nothing here can write rules: {reasons}. Install the package nftables (or iptables)")


def may_hold(name: BackendName) -> bool:
    """Whether rules of ours can stand in this backend's tables here; False saves starting its programs.

    For nft this is certain: the table is ours. Legacy tables are listed in /proc once they exist. iptables-nft's are nftables
    tables with iptables' names.
    """
    if name == "nft":
        return nft_table.exists()
    if name == "iptables-nft":
        return nft_table.has_iptables_chains()
    return any(_read(f"/proc/thread-self/net/{file}") for file in ("ip_tables_names", "ip6_tables_names"))


def generation() -> int | None:
    """A number that changes with every change of rules in this namespace; None where legacy tables make it say too little."""
    if may_hold("libiptc"):
        return None
    try:
        return nf_tables.generation()
    except OSError:
        return None  # no nf_tables in this kernel


def orphaned(missing: Mapping[BackendName, str]) -> Iterator[BackendName]:
    """Backends that hold rules of ours while the programs that wrote them are gone; orphans.py can remove them."""
    if nft_table.exists() and "nft" in missing:
        yield "nft"
    if nft_table.has_iptables_chains() and "iptables-nft" in missing:
        yield "iptables-nft"


def unreadable(missing: Mapping[BackendName, str]) -> bool:
    """Whether there are legacy tables, which may hold rules of ours, and nothing here that can look into them."""
    return may_hold("libiptc") and {"iptables-legacy", "libiptc"} <= missing.keys()


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
