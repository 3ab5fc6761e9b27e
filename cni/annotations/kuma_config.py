"""The configuration that Kuma's injector resolves and writes back to the pod, as YAML in an annotation. Pure.

A key that would change what is captured and that is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cni.annotations.view import Options
from interceptor.sources import YAML_NULLS

# Path -> option. Lists are joined, as their elements are one text each.
VALUES = {
    "kumaDPUser": "proxy_uid",
    "redirect.inbound.port": "inbound_port",
    "redirect.outbound.port": "outbound_port",
    "redirect.dns.port": "dns_port",
    "redirect.inbound.includePorts": "include_inbound_ports",
    "redirect.inbound.excludePorts": "exclude_inbound_ports",
    "redirect.inbound.excludePortsForIPs": "exclude_inbound_cidrs",
    "redirect.outbound.includePorts": "include_outbound_ports",
    "redirect.outbound.excludePorts": "exclude_outbound_ports",
    "redirect.outbound.excludePortsForIPs": "exclude_outbound_cidrs",
    "redirect.outbound.excludePortsForUIDs": "exclude_outbound_for_uids",
    "dropInvalidPackets": "drop_invalid",
    "log.enabled": "log_rules",
}
SEPARATORS = {"exclude_outbound_for_uids": ";"}
# These say how Kuma writes its rules, where it finds programs, what it prints.
ABOUT_KUMA = (
    *("cniMode", "comments", "dryRun", "ebpf", "executables", "log.level", "retry", "storeFirewalld", "verbose", "wait"),
    *("waitInterval", "redirect.dns.conntrackZoneSplit", "redirect.dns.resolvConfigPath", "redirect.namePrefix"),
    *("redirect.inbound.insertRedirectInsteadOfAppend", "redirect.outbound.insertRedirectInsteadOfAppend"),
)
HANDLED = (
    *("ipFamilyMode", "redirect.inbound.enabled", "redirect.outbound.enabled"),
    *("redirect.dns.enabled", "redirect.dns.captureAll"),
)


DEPTH = 8
SHOWN = 200  # of a value that should be a port or an address


def read(text: str, place: str, options: Options) -> None:
    """Put what the YAML in `text` says into `options`."""
    try:
        found = dict(_leaves(_loaded(text)))
    except ValueError as error:
        options.refuse(place, text[:80], str(error))
        return
    for path, value in found.items():
        where = f"{place}: {path}"
        if path in VALUES:
            name = VALUES[path]
            if texts := _texts(value):
                options.put(name, SEPARATORS.get(name, ",").join(texts), where)
        elif (
            path not in HANDLED
            and not any(path == known or path.startswith(known + ".") for known in ABOUT_KUMA)
            and _texts(value)
        ):
            options.refuse(where, str(value)[:80], "not known here, and it may change what is captured")
    _switches(found, place, options)


def _switches(found: dict[str, Any], place: str, options: Options) -> None:
    for direction in ("inbound", "outbound"):
        path = f"redirect.{direction}.enabled"
        if path in found:
            options.put(direction, "redirect" if found[path] == "true" else "off", f"{place}: {path}")
    if "true" in (found.get("redirect.dns.enabled"), found.get("redirect.dns.captureAll")):
        every = found.get("redirect.dns.captureAll") == "true"
        options.put("dns", "all" if every else "resolv-conf", f"{place}: redirect.dns")
    if found.get("ipFamilyMode") == "ipv4":
        options.put("ip_family", "v4", f"{place}: ipFamilyMode")


def _loaded(text: str) -> Any:
    import yaml  # 20 ms, for a pod that has it

    # BaseLoader: every scalar stays text. Whoever can write an annotation could have a number with a million digits parsed.
    try:
        # An alias can make a kilobyte a gigabyte, or a mapping its own child; Kuma writes none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.BaseLoader)):
            raise ValueError("YAML aliases are not read")
        found = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 - makes nothing but text, lists and mappings
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())[:200]}") from error
    if found and not isinstance(found, dict):
        raise ValueError("a YAML mapping is wanted")
    return found or {}


def _leaves(found: dict[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        path = f"{above}{key}"
        if isinstance(value, dict) and value and path.count(".") < DEPTH:
            yield from _leaves(value, path + ".")
        else:
            yield path, value


def _texts(value: object) -> list[str]:
    if isinstance(value, list):
        return [str(each)[:SHOWN] for each in value]
    text = str(value)
    return [] if text in YAML_NULLS else [text]
