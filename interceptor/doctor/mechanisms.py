"""Which mechanisms which backend can put into this kernel: each is tried, in a network namespace that is thrown away.

The same code writes the rules as in `init`, so what works here works there, and what fails says the same. Knows no rule.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator

from interceptor import capture
from interceptor.backends import detect
from interceptor.config import Backend, Config
from interceptor.doctor.finding import Finding, Status
from interceptor.errors import InterceptorError, NetnsError
from interceptor.netns import thrown_away
from interceptor.values import Mark

CGROUPS = "/sys/fs/cgroup"
# The least: the proxy known by a mark, which needs no module. Each way adds one thing.
LEAST = Config(conntrack_timeouts=False, proxy_uid=(), proxy_gid=(), proxy_mark=Mark(0x10000, 0x10000))
WAYS: dict[str, tuple[Config, str]] = {
    "redirect": (LEAST, "--inbound redirect, --outbound redirect"),
    "owner match": (
        dataclasses.replace(LEAST, proxy_uid=Config().proxy_uid),
        "--proxy-uid and every other option by user or group",
    ),
    "tproxy": (dataclasses.replace(LEAST, inbound="tproxy", outbound="tproxy", udp="tproxy"), "--inbound tproxy and --udp"),
    "conntrack zones": (dataclasses.replace(LEAST, dns="all"), "--dns"),
    "conntrack timeouts": (dataclasses.replace(LEAST, conntrack_timeouts=True), "--conntrack-timeouts, on by default"),
    "original source": (dataclasses.replace(LEAST, original_source=True), "--original-source"),
    "logging": (dataclasses.replace(LEAST, log_rules=True), "--log-rules"),
}


def findings(config: Config) -> Iterator[Finding]:
    """Whether `config` itself works, then each mechanism alone. Changes nothing that stays; may load modules, as init."""
    try:
        with thrown_away():
            missing = dict(detect.Missing(config.backend))
    except NetnsError as error:
        yield Finding("rules", "mechanisms", "unknown", f"not tried: {error}", "run doctor as root")
        return
    yield _configuration(config)
    backends = [name for name in detect.NAMES if name not in missing]
    if config.backend != "libiptc" and len(backends) > 1 and "libiptc" in backends:
        backends.remove("libiptc")  # seconds, for what is the last choice
    yield _programs(missing, backends)
    chosen = backends[0] if config.backend == "auto" and backends else config.backend
    for name, (way, used_by) in WAYS.items():
        yield _way(name, used_by, {backend: _refusal(way, backend) for backend in backends}, chosen)
    yield _cgroup_match("nft" in backends)


def _configuration(config: Config) -> Finding:
    try:
        with thrown_away():
            report = capture.enable(config)
    except InterceptorError as error:
        return Finding("rules", "this configuration", "missing", "init would fail", str(error), needed=True)
    return Finding("rules", "this configuration", "ok", f"init would use {report.backend} ({report.reason})", needed=True)


def _programs(missing: dict[detect.BackendName, str], tried: Collection[str]) -> Finding:
    there = [name for name in detect.NAMES if name not in missing]
    shown = ", ".join(name if name in tried else f"{name} (not tried)" for name in there) or "none"
    advice = "; ".join(f"{name}: {why}" for name, why in missing.items())
    status: Status = "ok" if not missing else "warn" if there else "missing"
    by_backend: dict[str, str] = {name: missing.get(name, "") for name in detect.NAMES}
    return Finding("rules", "backends", status, f"usable: {shown}", advice, by_backend=by_backend)


def _way(name: str, used_by: str, refusals: dict[str, str], chosen: str) -> Finding:
    working = ", ".join(backend for backend, why in refusals.items() if not why) or "none"
    failing = {backend: why for backend, why in refusals.items() if why}
    status: Status = "ok" if not failing else "missing" if chosen in failing or working == "none" else "warn"
    advice = f"for {used_by}. " + "; ".join(f"{backend}: {why}" for backend, why in failing.items()) if failing else ""
    return Finding("rules", name, status, f"works with {working}", advice, by_backend=refusals)


def _cgroup_match(has_nft: bool) -> Finding:
    name = "cgroup match"
    group = next((entry.name for entry in _entries(CGROUPS) if entry.is_dir()), None)
    if not os.path.exists(f"{CGROUPS}/cgroup.controllers"):
        return Finding("rules", name, "missing", f"no cgroup v2 at {CGROUPS}", "--proxy-cgroup cannot be used")
    if not has_nft:
        return Finding("rules", name, "missing", "only nft matches cgroups", "install the package nftables")
    if group is None:
        return Finding("rules", name, "unknown", f"not tried: there is no cgroup below {CGROUPS}")
    refusal = _refusal(dataclasses.replace(LEAST, proxy_mark=None, proxy_cgroup=group), "nft")
    if refusal:
        return Finding("rules", name, "missing", "refused", refusal, by_backend={"nft": refusal})
    return Finding("rules", name, "ok", "works with nft", by_backend={"nft": ""})


def _refusal(config: Config, backend: Backend) -> str:
    """Why `backend` cannot do what `config` says here; "" when it can."""
    try:
        with thrown_away():
            capture.enable(dataclasses.replace(config, backend=backend))
    except InterceptorError as error:
        return str(error)
    return ""


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
