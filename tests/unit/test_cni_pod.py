"""What is decided for a pod: each annotation that the meshes define, each reason to leave a pod alone."""

from __future__ import annotations

from typing import Any

import pytest

from cni import pod
from cni.annotations.view import PodView, view
from cni.entry import Entry
from cni.pod import Capture, Decision, Skip
from cni.protocol import Request
from interceptor.config import FIELD
from interceptor.errors import ConfigError
from tests.rig.capturing import NAMES

ARGS = {"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": "web", "K8S_POD_UID": "u-1"}
ENTRY = Entry(capture={"backend": "nft"}, agent_socket="/x", kubernetes={})
ISTIO = "traffic.sidecar.istio.io/"
LINKERD = "config.linkerd.io/"
KUMA = "traffic.kuma.io/"


def made(
    *containers: dict[str, Any],
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    of_namespace: dict[str, str] | None = None,
    ips: tuple[str, ...] = (),
    **spec: Any,
) -> PodView:
    """The view of a pod with these containers, beside the application."""
    meta = {"namespace": "shop", "name": "web", "uid": "u-1", "annotations": annotations, "labels": labels}
    return view(
        {"metadata": meta, "spec": {"containers": [{"name": "app"}, *containers], **spec}},
        {"metadata": {"annotations": of_namespace}},
        ips,
    )


def istio(*, proxy: dict[str, Any] | None = None, init: Any = None, **annotations: str) -> PodView:
    """A pod that Istio has injected; `annotations` without their prefix."""
    found = {"sidecar.istio.io/status": "{}", **{ISTIO + name: text for name, text in annotations.items()}}
    return made({"name": "istio-proxy", **(proxy or {})}, annotations=found, initContainers=init)


def linkerd(annotations: dict[str, str] | None = None, of_namespace: dict[str, str] | None = None) -> PodView:
    """A pod that Linkerd has injected."""
    own = {LINKERD + name: text for name, text in (annotations or {}).items()}
    of = {LINKERD + name: text for name, text in (of_namespace or {}).items()}
    return made({"name": "linkerd-proxy"}, annotations=own, of_namespace=of)


def kuma(**annotations: str) -> PodView:
    """A pod that Kuma has injected."""
    found = {"kuma.io/sidecar-injected": "true", **annotations}
    return made({"name": "kuma-sidecar"}, annotations=found)


def decided(found: PodView, entry: Entry = ENTRY, **arguments: str) -> Decision:
    """What is decided for a pod."""
    return pod.decide(Request("ADD", args={**ARGS, **arguments}), entry, lambda _namespace, _name, _uid: found)


def captured(found: PodView, **arguments: str) -> dict[str, str]:
    """The options of a pod that is captured, as text."""
    # The addresses come with the request, not from the API, which does not know them yet.
    previous = {"ips": [{"address": f"{ip}/24"} for ip in found.ips]}
    request = Request("ADD", args={**ARGS, **arguments}, config={"prevResult": previous})
    decision = pod.decide(request, ENTRY, lambda _namespace, _name, _uid: found)
    assert isinstance(decision, Capture), decision
    return {name: row.kind.show(getattr(decision.config, name)) for name, row in FIELD.items()}


def skipped(found: PodView, entry: Entry = ENTRY) -> str:
    """Why a pod is left alone."""
    decision = decided(found, entry)
    assert isinstance(decision, Skip), decision
    return decision.reason


def never(_namespace: str, _name: str, _uid: str) -> PodView:
    raise AssertionError("the API was asked")


def asked_nothing(entry: Entry = ENTRY, **arguments: str) -> Decision:
    return pod.decide(Request("ADD", args=arguments), entry, never)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "no pod"),
        ({"K8S_POD_NAME": "web"}, "no pod"),
        ({"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": ""}, "no pod"),
        ({"K8S_POD_NAMESPACE": "kube-system", "K8S_POD_NAME": "x"}, "kube-system is excluded"),
        ({"K8S_POD_NAMESPACE": "interceptor", "K8S_POD_NAME": "interceptor-cni-x7k2p"}, "own pod"),
    ],
)
def test_the_api_is_not_asked_where_arguments_decide(arguments: dict[str, str], reason: str) -> None:
    decision = asked_nothing(**arguments)
    assert isinstance(decision, Skip)
    assert reason in decision.reason


def test_without_kubernetes_the_api_is_never_asked() -> None:
    assert isinstance(asked_nothing(Entry(capture={"backend": "nft"}), **ARGS), Capture)


def test_the_lookup_is_given_the_pods_name_and_uid() -> None:
    asked = []

    def lookup(namespace: str, name: str, uid: str) -> PodView:
        asked.append((namespace, name, uid))
        return made()

    pod.decide(Request("ADD", args=ARGS), ENTRY, lookup)
    assert asked == [("shop", "web", "u-1")]


def test_the_own_pods_name_can_be_configured() -> None:
    entry = Entry(agent_socket="/x", kubernetes={"agentNamespace": "mesh", "agentPrefix": "node-", "excludeNamespaces": []})
    assert isinstance(asked_nothing(entry, K8S_POD_NAMESPACE="mesh", K8S_POD_NAME="node-1"), Skip)


@pytest.mark.parametrize(
    ("kubernetes", "named"),
    [
        ({"colour": 1}, "kubernetes.colour"),
        ({"excludeNamespaces": "kube-system"}, "kubernetes.excludeNamespaces"),
        ({"meshes": ["osm"]}, "osm"),
        ({"agentPrefix": ""}, "kubernetes.agentPrefix"),
        ({"proxyContainers": [3]}, "kubernetes.proxyContainers"),
    ],
)
def test_what_is_wrong_with_the_entry_is_named(kubernetes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        pod.decide(Request("ADD", args=ARGS), Entry(agent_socket="/x", kubernetes=kubernetes), never)


PROXY = {"name": "interceptor-proxy"}
ISTIO_PROXY = {"name": "istio-proxy"}
INJECTED = {"sidecar.istio.io/status": "{}"}
KUMA_INJECTED = {"kuma.io/sidecar-injected": "true"}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        pytest.param(made(PROXY, hostNetwork=True), "host's network", id="host-network"),
        pytest.param(made(), "no proxy container", id="no-proxy"),
        pytest.param(made(PROXY, annotations={"interceptor.io/capture": "false"}), "pod's annotation", id="opted-out"),
        pytest.param(
            made(PROXY, of_namespace={"interceptor.io/capture": "false"}), "namespace's annotation", id="namespace-out"
        ),
        pytest.param(made(ISTIO_PROXY), "was not injected", id="istio-no-status"),
        pytest.param(istio(init=[{"name": "istio-init"}]), "istio-init", id="istio-init"),
        pytest.param(istio(proxy={"env": [{"name": "DISABLE_ENVOY", "value": "true"}]}), "DISABLE_ENVOY", id="istio-no-envoy"),
        pytest.param(istio(proxy={"args": ["proxy", "router"]}), "is a router", id="istio-gateway"),
        pytest.param(
            made(ISTIO_PROXY, annotations={**INJECTED, "sidecar.istio.io/inject": "false"}), "annotation", id="istio-annotation"
        ),
        pytest.param(
            made(ISTIO_PROXY, annotations=INJECTED, labels={"sidecar.istio.io/inject": "false"}), "label", id="istio-label"
        ),
        pytest.param(
            made(ISTIO_PROXY, annotations={**INJECTED, "sidecar.istio.io/interceptionMode": "NONE"}), "NONE", id="istio-none"
        ),
        pytest.param(
            made({"name": "linkerd-proxy"}, initContainers=[{"name": "linkerd-init"}]), "linkerd-init", id="linkerd-init"
        ),
        pytest.param(
            made({"name": "linkerd-proxy"}, annotations={"linkerd.io/inject": "disabled"}), "disabled", id="linkerd-disabled"
        ),
        pytest.param(made({"name": "kuma-sidecar"}), "sidecar-injected", id="kuma-not-injected"),
        pytest.param(
            made({"name": "kuma-sidecar"}, annotations=KUMA_INJECTED, initContainers=[{"name": "kuma-init"}]),
            "kuma-init",
            id="kuma-init",
        ),
        pytest.param(
            made({"name": "kuma-sidecar"}, annotations={**KUMA_INJECTED, "kuma.io/transparent-proxying": "disabled"}),
            "transparent-proxying",
            id="kuma-off",
        ),
        pytest.param(
            made(PROXY, annotations={"interceptor.io/outbound": "off", "interceptor.io/inbound": "off"}),
            "are off",
            id="all-off",
        ),
    ],
)
def test_a_pod_is_left_alone(found: PodView, reason: str) -> None:
    assert reason in skipped(found)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(made(PROXY), id="ours"),
        pytest.param(made(initContainers=[{**PROXY, "restartPolicy": "Always"}]), id="native-sidecar"),
        pytest.param(
            made(PROXY, annotations={"interceptor.io/capture": "true"}, of_namespace={"interceptor.io/capture": "false"}),
            id="pod-over-namespace",
        ),
        pytest.param(istio(proxy={"args": ["proxy", "sidecar", "--domain"]}), id="istio-sidecar"),
        pytest.param(istio(proxy={"args": ["proxy", "--domain", "x"]}), id="istio-option"),
        pytest.param(istio(proxy={"args": ["proxy"]}), id="istio-bare"),
        pytest.param(
            made(
                ISTIO_PROXY,
                annotations={**INJECTED, "sidecar.istio.io/inject": "false"},
                labels={"sidecar.istio.io/inject": "true"},
            ),
            id="istio-label-over-annotation",
        ),
        pytest.param(linkerd(), id="linkerd"),
        pytest.param(kuma(), id="kuma"),
    ],
)
def test_a_pod_is_captured(found: PodView) -> None:
    assert isinstance(decided(found), Capture)


ISTIO_DEFAULTS = {
    "outbound": "redirect",
    "inbound": "redirect",
    "outbound_port": "15001",
    "inbound_port": "15006",
    "dns": "off",
    "proxy_uid": "1337",
    "proxy_gid": "1337",
    "include_outbound_cidrs": "",
    "exclude_outbound_cidrs": "",
    "include_outbound_ports": "",
    "exclude_outbound_ports": "15020",
    "include_inbound_ports": "",
    "exclude_inbound_ports": "15020-15021,15090",
    "exclude_interfaces": "",
    "virtual_interfaces": "",
    "drop_invalid": "false",
    "original_source": "false",
    "ip_family": "auto",
}


def env(**variables: str) -> dict[str, Any]:
    return {"env": [{"name": name, "value": value} for name, value in variables.items()]}


def context(**values: int) -> dict[str, Any]:
    return {"securityContext": values}


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        pytest.param(istio(), {}, id="defaults"),
        pytest.param(istio(includeOutboundIPRanges="*"), {}, id="all-cidrs"),
        pytest.param(
            istio(includeOutboundIPRanges="10.0.0.0/8,fd00::/8"),
            {"include_outbound_cidrs": "10.0.0.0/8,fd00::/8"},
            id="in-cidrs",
        ),
        pytest.param(istio(includeOutboundIPRanges=""), {"outbound": "off"}, id="no-cidrs"),
        pytest.param(
            istio(includeOutboundIPRanges="", includeOutboundPorts="80,443"),
            {"include_outbound_ports": "80,443"},
            id="ports-only",
        ),
        pytest.param(istio(includeOutboundPorts="80"), {}, id="ports-add-nothing-to-all"),
        pytest.param(istio(excludeOutboundIPRanges="10.1.0.0/16"), {"exclude_outbound_cidrs": "10.1.0.0/16"}, id="out-cidrs"),
        pytest.param(istio(excludeOutboundPorts="25,3306"), {"exclude_outbound_ports": "25,3306"}, id="out-ports"),
        pytest.param(istio(excludeOutboundPorts=""), {"exclude_outbound_ports": ""}, id="no-out-ports"),
        pytest.param(istio(includeInboundPorts=""), {"inbound": "off", "exclude_inbound_ports": ""}, id="no-inbound"),
        pytest.param(
            istio(includeInboundPorts="80", excludeInboundPorts="81"),
            {"include_inbound_ports": "80", "exclude_inbound_ports": ""},
            id="inbound-list-ignores-exclusions",
        ),
        pytest.param(istio(excludeInboundPorts="9000,"), {"exclude_inbound_ports": "9000,15020-15021,15090"}, id="in-ports"),
        pytest.param(istio(excludeInterfaces="eth1,eth2"), {"exclude_interfaces": "eth1,eth2"}, id="interfaces"),
        pytest.param(istio(kubevirtInterfaces="k6t-net0"), {"virtual_interfaces": "k6t-net0"}, id="kubevirt"),
        pytest.param(
            made(
                ISTIO_PROXY,
                annotations={**INJECTED, "istio.io/reroute-virtual-interfaces": "net0", ISTIO + "kubevirtInterfaces": "net1"},
            ),
            {"virtual_interfaces": "net0"},
            id="reroute-preferred",
        ),
        pytest.param(
            made(ISTIO_PROXY, annotations={**INJECTED, "sidecar.istio.io/interceptionMode": "TPROXY"}),
            {"inbound": "tproxy", "original_source": "true"},
            id="tproxy",
        ),
        pytest.param(istio(proxy=env(ISTIO_META_DNS_CAPTURE="true")), {"dns": "all"}, id="dns"),
        pytest.param(istio(proxy=env(INVALID_DROP="1")), {"drop_invalid": "true"}, id="invalid"),
        pytest.param(
            istio(proxy=context(runAsUser=1000720000, runAsGroup=5)), {"proxy_uid": "1000720000", "proxy_gid": "5"}, id="uid"
        ),
        pytest.param(istio(proxy=context(runAsUser=0)), {}, id="root-is-the-default"),
        pytest.param(
            made(ISTIO_PROXY, annotations=INJECTED, ips=("10.0.0.2", "fd00::2")), {"ip_family": "v4"}, id="first-family"
        ),
        pytest.param(
            made({**ISTIO_PROXY, **env(ISTIO_DUAL_STACK="true")}, annotations=INJECTED, ips=("10.0.0.2",)), {}, id="dual-stack"
        ),
    ],
)
def test_istios_annotations(found: PodView, changes: dict[str, str]) -> None:
    options = captured(found)
    wanted = {**ISTIO_DEFAULTS, **changes}
    assert {name: options[name] for name in wanted} == wanted


LINKERD_DEFAULTS = {
    "outbound": "redirect",
    "inbound": "redirect",
    "outbound_port": "4140",
    "inbound_port": "4143",
    "proxy_uid": "2102",
    "proxy_gid": "",
    "exclude_inbound_ports": "4190-4191,4567-4568",
    "exclude_outbound_ports": "4567-4568",
    "exclude_inbound_cidrs": "",
    "exclude_outbound_cidrs": "",
}


@pytest.mark.parametrize(
    ("own", "of_namespace", "changes"),
    [
        pytest.param({}, {}, {}, id="defaults"),
        pytest.param(
            {"skip-inbound-ports": "25,8000-8010"}, {}, {"exclude_inbound_ports": "25,4190-4191,4567-4568,8000-8010"}, id="in"
        ),
        pytest.param({"skip-outbound-ports": "25"}, {}, {"exclude_outbound_ports": "25"}, id="out-replaces"),
        pytest.param({"skip-outbound-ports": ""}, {}, {"exclude_outbound_ports": ""}, id="out-none"),
        pytest.param({"skip-subnets": "10.0.0.0/8"}, {}, {"exclude_inbound_cidrs": "10.0.0.0/8"}, id="subnets"),
        pytest.param({"proxy-uid": "77", "proxy-gid": "78"}, {}, {"proxy_uid": "77", "proxy_gid": "78"}, id="ids"),
        pytest.param({}, {"skip-outbound-ports": "53"}, {"exclude_outbound_ports": "53"}, id="namespace"),
        pytest.param(
            {"skip-outbound-ports": "1"}, {"skip-outbound-ports": "2"}, {"exclude_outbound_ports": "1"}, id="pod-wins"
        ),
        pytest.param({"opaque-ports": "3306", "close-wait-timeout": "3600s"}, {}, {}, id="others"),
    ],
)
def test_linkerds_annotations(own: dict[str, str], of_namespace: dict[str, str], changes: dict[str, str]) -> None:
    options = captured(linkerd(own, of_namespace))
    wanted = {**LINKERD_DEFAULTS, **changes}
    assert {name: options[name] for name in wanted} == wanted


KUMA_DEFAULTS = {
    "outbound": "redirect",
    "inbound": "redirect",
    "outbound_port": "15001",
    "inbound_port": "15006",
    "dns": "off",
    "proxy_uid": "5678",
    "proxy_gid": "",
    "exclude_inbound_ports": "",
    "exclude_outbound_ports": "",
    "exclude_inbound_cidrs": "",
    "exclude_outbound_cidrs": "",
    "exclude_outbound_for_uids": "",
    "drop_invalid": "false",
    "log_rules": "false",
    "ip_family": "auto",
}
RESOLVED = """
kumaDPUser: "5679"
ipFamilyMode: ipv4
redirect:
  dns: {enabled: true, captureAll: true, port: 15153}
  inbound: {enabled: false, port: 15106}
  outbound: {enabled: true, port: 15101, excludePorts: [25, 26], excludePortsForUIDs: ["tcp:22:106", "udp:*:107"]}
wait: 5
"""


@pytest.mark.parametrize(
    ("annotations", "changes"),
    [
        pytest.param({}, {}, id="defaults"),
        pytest.param({KUMA + "exclude-inbound-ports": "1,2"}, {"exclude_inbound_ports": "1-2"}, id="in-ports"),
        pytest.param({KUMA + "exclude-outbound-ports": "25"}, {"exclude_outbound_ports": "25"}, id="out-ports"),
        pytest.param({KUMA + "exclude-inbound-ips": "10.0.0.1"}, {"exclude_inbound_cidrs": "10.0.0.1/32"}, id="in-ips"),
        pytest.param({KUMA + "exclude-outbound-ips": "fd00::/8"}, {"exclude_outbound_cidrs": "fd00::/8"}, id="out-ips"),
        pytest.param(
            {KUMA + "exclude-outbound-ports-for-uids": "tcp:22:100;*:*:106-108"},
            {"exclude_outbound_for_uids": "tcp:22:100;*:*:106-108"},
            id="for-uids",
        ),
        pytest.param({KUMA + "drop-invalid-packets": "true"}, {"drop_invalid": "true"}, id="invalid"),
        pytest.param({KUMA + "iptables-logs": "enabled"}, {"log_rules": "true"}, id="logs"),
        pytest.param({"kuma.io/gateway": "enabled"}, {"inbound": "off"}, id="gateway"),
        pytest.param({"kuma.io/transparent-proxying-ip-family-mode": "ipv4"}, {"ip_family": "v4"}, id="ipv4"),
        pytest.param({"kuma.io/transparent-proxying-ip-family-mode": "dualstack"}, {}, id="dualstack"),
        pytest.param({"kuma.io/sidecar-uid": "99"}, {"proxy_uid": "99"}, id="uid"),
        pytest.param(
            {KUMA + "transparent-proxy-config": RESOLVED},
            {
                "proxy_uid": "5679",
                "ip_family": "v4",
                "dns": "all",
                "inbound": "off",
                "inbound_port": "15106",
                "outbound_port": "15101",
                "exclude_outbound_ports": "25-26",
                "exclude_outbound_for_uids": "tcp:22:106;udp:*:107",
            },
            id="resolved",
        ),
        pytest.param(
            {
                KUMA + "transparent-proxy-config": "redirect: {outbound: {excludePorts: [1]}}",
                KUMA + "exclude-outbound-ports": "2",
            },
            {"exclude_outbound_ports": "2"},
            id="annotation-over-resolved",
        ),
    ],
)
def test_kumas_annotations(annotations: dict[str, str], changes: dict[str, str]) -> None:
    options = captured(kuma(**annotations))
    wanted = {**KUMA_DEFAULTS, **changes}
    rules = FIELD["exclude_outbound_for_uids"].kind
    wanted["exclude_outbound_for_uids"] = rules.show(rules.parse(wanted["exclude_outbound_for_uids"], NAMES))
    assert {name: options[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("found", "named"),
    [
        pytest.param(istio(excludeOutboundPorts="1-5"), "excludeOutboundPorts", id="istio-range"),
        pytest.param(istio(excludeInboundPorts="http"), "excludeInboundPorts", id="istio-name"),
        pytest.param(istio(excludeOutboundIPRanges="*"), "excludeOutboundIPRanges", id="istio-exclude-all"),
        pytest.param(istio(includeOutboundIPRanges="10.0.0.1/8"), "includeOutboundIPRanges", id="istio-host-bits"),
        pytest.param(
            istio(includeOutboundIPRanges="10.0.0.0/8", includeOutboundPorts="80"), "either this or", id="istio-union"
        ),
        pytest.param(
            made(ISTIO_PROXY, annotations={**INJECTED, "sidecar.istio.io/interceptionMode": "tproxy"}),
            "interceptionMode",
            id="mode",
        ),
        pytest.param(linkerd({"skip-outbound-ports": "0"}), "skip-outbound-ports", id="linkerd-port"),
        pytest.param(linkerd({"proxy-uid": "linkerd"}), "proxy-uid", id="linkerd-uid"),
        pytest.param(kuma(**{KUMA + "drop-invalid-packets": "maybe"}), "drop-invalid-packets", id="kuma-switch"),
        pytest.param(kuma(**{KUMA + "transparent-proxy-config": "- x"}), "mapping", id="kuma-list"),
        pytest.param(kuma(**{KUMA + "transparent-proxy-config": "a: ["}), "not YAML", id="kuma-yaml"),
        pytest.param(kuma(**{KUMA + "transparent-proxy-config": "a: &a [*a]"}), "aliases", id="kuma-alias"),
        pytest.param(kuma(**{KUMA + "transparent-proxy-config": "a: 0x" + "f" * 9000}), "not known", id="kuma-long"),
        pytest.param(
            kuma(**{KUMA + "transparent-proxy-config": "redirect: {vnet: {networks: ['docker0:172.17.0.0/16']}}"}),
            "vnet",
            id="vnet",
        ),
        pytest.param(made(PROXY, annotations={"interceptor.io/colour": "red"}), "interceptor.io/colour", id="ours-unknown"),
        pytest.param(made(PROXY, annotations={"interceptor.io/capture": "no"}), "interceptor.io/capture", id="capture"),
        pytest.param(made(PROXY, of_namespace={"interceptor.io/capture": "True"}), "interceptor.io/capture", id="of-namespace"),
        pytest.param(made(PROXY, of_namespace={"interceptor.io/dns": "yes"}), "interceptor.io/dns", id="ours-bad"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(found: PodView, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        decided(found)


def test_nearer_sources_win() -> None:
    found = made(
        PROXY,
        annotations={"interceptor.io/exclude-outbound-ports": "3"},
        of_namespace={"interceptor.io/exclude-outbound-ports": "2", "interceptor.io/exclude-inbound-ports": "2"},
    )
    options = captured(found, INTERCEPTOR_EXCLUDE_OUTBOUND_PORTS="1", INTERCEPTOR_INBOUND_PORT="15106")
    assert (options["exclude_outbound_ports"], options["exclude_inbound_ports"], options["inbound_port"]) == ("3", "2", "15106")


def test_our_annotations_go_over_a_meshs() -> None:
    found = made(
        ISTIO_PROXY,
        annotations={**INJECTED, ISTIO + "excludeOutboundPorts": "25", "interceptor.io/exclude-outbound-ports": "26-30"},
    )
    assert captured(found)["exclude_outbound_ports"] == "26-30"


def test_the_proxys_ids_come_from_its_container_and_else_from_the_pod() -> None:
    by_container = captured(made({**PROXY, **context(runAsUser=4000, runAsGroup=4001)}, securityContext={"runAsUser": 1}))
    by_pod = captured(made(PROXY, securityContext={"runAsUser": 5000}))
    assert (by_container["proxy_uid"], by_container["proxy_gid"], by_pod["proxy_uid"]) == ("4000", "4001", "5000")


def test_a_mesh_that_is_not_listed_is_not_looked_for() -> None:
    entry = Entry(agent_socket="/x", kubernetes={"meshes": ["linkerd"]})
    assert skipped(istio(), entry) == "it has no proxy container"


def test_a_namespace_lets_its_init_containers_out_and_a_pod_of_it_does_not() -> None:
    out = {"interceptor.io/before-proxy": "bypass"}
    assert captured(made(PROXY, of_namespace=out))["before_proxy"] == "bypass"
    assert (
        captured(made(PROXY, of_namespace=out, annotations={"interceptor.io/before-proxy": "block"}))["before_proxy"] == "block"
    )
