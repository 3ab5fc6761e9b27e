"""Linkerd's annotations, with the meaning that linkerd-cni gives them. Pure."""

from __future__ import annotations

from cni.annotations.view import Container, Meant, Options, PodView

PROXY = "linkerd-proxy"
INIT = "linkerd-init"
INJECT = "linkerd.io/inject"
CONFIG = "config.linkerd.io/"
SKIP_IN = CONFIG + "skip-inbound-ports"
SKIP_OUT = CONFIG + "skip-outbound-ports"
SKIP_SUBNETS = CONFIG + "skip-subnets"
UID = CONFIG + "proxy-uid"
GID = CONFIG + "proxy-gid"
DEFAULT_UID = 2102
# Control and admin of the proxy: never captured. Galera's two are the chart's default for both directions.
PROXY_PORTS = "4190,4191"
DEFAULT_SKIPPED = "4567,4568"


def applies(pod: PodView) -> bool:
    """Whether this is a pod with Linkerd's proxy."""
    return pod.container(PROXY) is not None


def read(pod: PodView) -> Meant:
    """What the annotations of a pod with a linkerd-proxy, and of its namespace, say."""
    proxy = pod.container(PROXY)
    assert proxy is not None
    if pod.container(INIT) is not None:
        return Meant(f"container {INIT} captures it")
    if pod.annotations.get(INJECT) == "disabled":
        return Meant(f"annotation {INJECT} is disabled")
    options = Options("linkerd")
    for name, value in (("outbound", "redirect"), ("inbound", "redirect"), ("udp", "off"), ("dns", "off")):
        options.put(name, value)
    options.put("outbound_port", "4140")
    options.put("inbound_port", "4143")
    _identity(options, pod, proxy)
    # What is skipped inbound is added to the defaults, what is skipped outbound takes their place.
    inbound = (pod.inherited(SKIP_IN) or "").strip().strip(",")
    options.put("exclude_inbound_ports", ",".join(filter(None, (PROXY_PORTS, DEFAULT_SKIPPED, inbound))), SKIP_IN)
    outbound = pod.inherited(SKIP_OUT)
    options.put("exclude_outbound_ports", DEFAULT_SKIPPED if outbound is None else outbound, SKIP_OUT)
    # By the client's address, inbound: that is what linkerd-cni does with it.
    options.put("exclude_inbound_cidrs", pod.inherited(SKIP_SUBNETS) or "", SKIP_SUBNETS)
    return Meant(layer=options.layer)


def _identity(options: Options, pod: PodView, proxy: Container) -> None:
    uid, gid = pod.inherited(UID), pod.inherited(GID)
    options.put("proxy_uid", uid or str(proxy.uid or DEFAULT_UID), UID if uid else None)
    # Without one, Linkerd matches no group: the application's may be the proxy's too.
    options.put("proxy_gid", gid or "", GID if gid else None)
