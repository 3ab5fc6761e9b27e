"""Istio's annotations, with the meaning that istio-cni and istio-init give them. Pure.

What cannot be said in our options is refused: an exclusion that is dropped is captured traffic, and the other way round.
"""

from __future__ import annotations

from cni.annotations.view import Container, Meant, Options, PodView, is_false, is_true

PROXY = "istio-proxy"
INIT = "istio-init"
DEFAULT_ID = 1337
MODE = "sidecar.istio.io/interceptionMode"
INJECT = "sidecar.istio.io/inject"
STATUS = "sidecar.istio.io/status"
TRAFFIC = "traffic.sidecar.istio.io/"
INCLUDE_CIDRS = TRAFFIC + "includeOutboundIPRanges"
EXCLUDE_CIDRS = TRAFFIC + "excludeOutboundIPRanges"
INCLUDE_OUT = TRAFFIC + "includeOutboundPorts"
EXCLUDE_OUT = TRAFFIC + "excludeOutboundPorts"
INCLUDE_IN = TRAFFIC + "includeInboundPorts"
EXCLUDE_IN = TRAFFIC + "excludeInboundPorts"
EXCLUDE_INTERFACES = TRAFFIC + "excludeInterfaces"
VIRTUAL = "istio.io/reroute-virtual-interfaces"
VIRTUAL_OLD = TRAFFIC + "kubevirtInterfaces"
# Status and health ports of the agent and of Envoy: probes must reach them without mutual TLS.
AGENT_PORTS = "15020,15021,15090"
ALL = "*"


def applies(pod: PodView) -> bool:
    """Whether this is a pod with Istio's sidecar."""
    return pod.container(PROXY) is not None


def read(pod: PodView) -> Meant:
    """What the annotations of a pod with an istio-proxy say."""
    proxy = pod.container(PROXY)
    assert proxy is not None
    if reason := _skipped(pod, proxy):
        return Meant(reason)
    options = Options("istio")
    mode = pod.annotations.get(MODE, "REDIRECT")
    if mode not in ("REDIRECT", "TPROXY"):
        options.refuse(MODE, mode, "REDIRECT, TPROXY or NONE")
    _fixed(options, pod, proxy, mode)
    _outbound(options, pod)
    _inbound(options, pod, "tproxy" if mode == "TPROXY" else "redirect")
    _interfaces(options, pod)
    return Meant(layer=options.layer)


def _skipped(pod: PodView, proxy: Container) -> str | None:
    if pod.container(INIT) is not None:
        return f"container {INIT} captures it"
    if is_true(proxy.env.get("DISABLE_ENVOY")):
        return f"DISABLE_ENVOY of {PROXY}"
    # `proxy router` is a gateway; `proxy` and `proxy sidecar` are sidecars.
    if (
        proxy.args[:1] == ("proxy",)
        and len(proxy.args) > 1
        and proxy.args[1] not in ("", "sidecar")
        and proxy.args[1][0] != "-"
    ):
        return f"{PROXY} is a {proxy.args[1]}"
    for place, text in (("label", pod.labels.get(INJECT)), ("annotation", pod.annotations.get(INJECT))):
        if text is not None:
            if is_false(text):
                return f"{place} {INJECT} is {text}"
            break  # the label goes before the annotation
    if STATUS not in pod.annotations:
        return f"annotation {STATUS} is missing: the sidecar was not injected"
    if pod.annotations.get(MODE) == "NONE":
        return f"annotation {MODE} is NONE"
    return None


def _fixed(options: Options, pod: PodView, proxy: Container, mode: str) -> None:
    for name, port in (("outbound_port", 15001), ("inbound_port", 15006), ("dns_port", 15053), ("tunnel_port", 15008)):
        options.put(name, str(port))
    options.put("proxy_uid", str(proxy.uid or DEFAULT_ID))
    options.put("proxy_gid", str(proxy.gid or DEFAULT_ID))
    options.put("original_source", "true" if mode == "TPROXY" else "false")
    options.put("dns", "all" if is_true(proxy.env.get("ISTIO_META_DNS_CAPTURE")) else "off")
    options.put("drop_invalid", "true" if is_true(proxy.env.get("INVALID_DROP")) else "false")
    # Without dual stack Envoy listens for the family of the pod's first address alone.
    if not is_true(proxy.env.get("ISTIO_DUAL_STACK")) and pod.ips:
        options.put("ip_family", "v6" if ":" in pod.ips[0] else "v4")


def _outbound(options: Options, pod: PodView) -> None:
    cidrs = pod.annotations.get(INCLUDE_CIDRS, ALL)
    ports = pod.annotations.get(INCLUDE_OUT, "")
    excluded = pod.annotations.get(EXCLUDE_CIDRS, "")
    _single_ports(options, pod, EXCLUDE_OUT)
    options.put("exclude_outbound_ports", pod.annotations.get(EXCLUDE_OUT, "15020"), EXCLUDE_OUT)
    options.put("exclude_outbound_cidrs", excluded, EXCLUDE_CIDRS)
    options.put("outbound", "redirect")
    if cidrs == ALL:
        return  # included ports add nothing to everything
    if not ports:
        options.put("outbound" if not cidrs else "include_outbound_cidrs", cidrs or "off", INCLUDE_CIDRS)
        return
    _single_ports(options, pod, INCLUDE_OUT)
    options.put("include_outbound_ports", ports, INCLUDE_OUT)
    if cidrs:
        expected = f"either this or {INCLUDE_CIDRS}: Istio captures what either names, and that is not supported"
        options.refuse(INCLUDE_OUT, ports, expected)


def _inbound(options: Options, pod: PodView, mechanism: str) -> None:
    included = pod.annotations.get(INCLUDE_IN, ALL)
    if included == "":
        options.put("inbound", "off", INCLUDE_IN)
        return
    options.put("inbound", mechanism)
    if included != ALL:
        # Istio looks at the exclusions only where everything is included.
        _single_ports(options, pod, INCLUDE_IN)
        options.put("include_inbound_ports", included, INCLUDE_IN)
        options.put("exclude_inbound_ports", "")
        return
    _single_ports(options, pod, EXCLUDE_IN)
    excluded = pod.annotations.get(EXCLUDE_IN, "").strip().strip(",")
    options.put("exclude_inbound_ports", f"{excluded},{AGENT_PORTS}" if excluded else AGENT_PORTS, EXCLUDE_IN)


def _interfaces(options: Options, pod: PodView) -> None:
    if EXCLUDE_INTERFACES in pod.annotations:
        options.put("exclude_interfaces", pod.annotations[EXCLUDE_INTERFACES], EXCLUDE_INTERFACES)
    for name in (VIRTUAL, VIRTUAL_OLD):
        if name in pod.annotations:
            options.put("virtual_interfaces", pod.annotations[name], name)
            return


def _single_ports(options: Options, pod: PodView, name: str) -> None:
    # istio#45810: no ranges. Taking one would make a pod that only works here.
    text = pod.annotations.get(name, "")
    if "-" in text:
        options.refuse(name, text, "single ports: Istio knows no ranges here; interceptor.io/ annotations do")
