"""Kuma's annotations, with the meaning that kuma-cni gives them; the resolved configuration is kuma_config.py's. Pure."""

from __future__ import annotations

from cni.annotations import kuma_config
from cni.annotations.view import Container, Meant, Options, PodView, is_false, is_true

PROXY = "kuma-sidecar"
INIT = "kuma-init"
KUMA = "kuma.io/"
TRAFFIC = "traffic.kuma.io/"
INJECTED = KUMA + "sidecar-injected"
TRANSPARENT = KUMA + "transparent-proxying"
GATEWAY = KUMA + "gateway"
UID = KUMA + "sidecar-uid"
FAMILY = KUMA + "transparent-proxying-ip-family-mode"
RESOLVED = TRAFFIC + "transparent-proxy-config"
FAMILIES = {"ipv4": "v4", "dualstack": "auto"}
DEFAULT_UID = 5678
TEXTS = {
    TRAFFIC + "exclude-inbound-ports": "exclude_inbound_ports",
    TRAFFIC + "exclude-outbound-ports": "exclude_outbound_ports",
    TRAFFIC + "exclude-inbound-ips": "exclude_inbound_cidrs",
    TRAFFIC + "exclude-outbound-ips": "exclude_outbound_cidrs",
    TRAFFIC + "exclude-outbound-ports-for-uids": "exclude_outbound_for_uids",
}
SWITCHES = {TRAFFIC + "drop-invalid-packets": "drop_invalid", TRAFFIC + "iptables-logs": "log_rules"}
PORTS = {
    KUMA + "transparent-proxying-outbound-port": "outbound_port",
    KUMA + "transparent-proxying-inbound-port": "inbound_port",
    KUMA + "builtin-dns-port": "dns_port",
}
# strconv.ParseBool's, and Kuma's own.
ON = ("enabled", "true")
OFF = ("disabled", "false")


def applies(pod: PodView) -> bool:
    """Whether this is a pod with Kuma's sidecar."""
    return pod.container(PROXY) is not None


def read(pod: PodView) -> Meant:
    """What the annotations of a pod with a kuma-sidecar say."""
    proxy = pod.container(PROXY)
    assert proxy is not None
    if pod.container(INIT) is not None:
        return Meant(f"container {INIT} captures it")
    if not _is_on(pod.annotations.get(INJECTED)):
        return Meant(f"annotation {INJECTED} does not say true")
    if pod.annotations.get(TRANSPARENT) in OFF:
        return Meant(f"annotation {TRANSPARENT} is {pod.annotations[TRANSPARENT]}")
    options = Options("kuma")
    _defaults(options, proxy)
    if (resolved := pod.annotations.get(RESOLVED)) is not None:
        kuma_config.read(resolved, RESOLVED, options)
    _annotations(options, pod)
    return Meant(layer=options.layer)


def _defaults(options: Options, proxy: Container) -> None:
    options.put("outbound", "redirect")
    options.put("inbound", "redirect")
    options.put("udp", "off")
    options.put("dns", "off")
    for name, port in (("outbound_port", 15001), ("inbound_port", 15006), ("dns_port", 15053)):
        options.put(name, str(port))
    options.put("proxy_uid", str(proxy.uid or DEFAULT_UID))
    options.put("proxy_gid", "")


def _annotations(options: Options, pod: PodView) -> None:
    found = pod.annotations
    for name, option in {**TEXTS, **PORTS}.items():
        if name in found:
            options.put(option, found[name], name)
    for name, option in SWITCHES.items():
        if name not in found:
            continue
        if _is_on(found[name]) or found[name] in OFF or is_false(found[name]):
            options.put(option, "true" if _is_on(found[name]) else "false", name)
        else:
            options.refuse(name, found[name], "enabled or disabled")
    if UID in found:
        options.put("proxy_uid", found[UID], UID)
    if _is_on(found.get(KUMA + "builtin-dns")):
        options.put("dns", "all", KUMA + "builtin-dns")
    if _is_on(found.get(GATEWAY)):
        options.put("inbound", "off", GATEWAY)
    if FAMILY in found:
        if found[FAMILY] in FAMILIES:
            options.put("ip_family", FAMILIES[found[FAMILY]], FAMILY)
        else:
            options.refuse(FAMILY, found[FAMILY], f"one of {', '.join(FAMILIES)}")


def _is_on(text: str | None) -> bool:
    return text in ON or is_true(text)
