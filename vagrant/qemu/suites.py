"""Which kernels there are, and which tests run on each, as arguments of pytest."""

from __future__ import annotations

# By the Debian suite it comes from. The newest is first: what breaks there is news.
# Its own tools matter as much: nft 1.1 lists rules otherwise than 1.0.
USERLANDS = {"6.12": "trixie"}
KERNELS = {"6.12": "trixie", "6.1": "bookworm", "5.10": "bullseye"}
# libiptc's worker takes seconds a call under emulation; it has a variant of its own.
_BACKENDS = ("nft", "iptables-nft", "iptables-legacy")
_AGAIN = "tests/netns/test_contract_lifecycle.py::test_enable_again_touches_nothing"
_CLEAN = "tests/netns/test_contract_lifecycle.py::test_disable_leaves_everything_as_it_was"
_PACKETS = "tests/netns/test_probe.py::test_every_captured_path_is_proved"
_PROXY = (
    "outbound_redirect_reaches_the_original_destination",
    "inbound_redirect_reaches_the_application_from_the_passthrough_address",
    "outbound_tproxy_reaches_the_original_destination",
    "inbound_tproxy_reaches_the_application",
    "inbound_udp_reaches_the_application_from_the_passthrough_address",
    "dns_queries_are_forwarded_and_answers_come_from_whom_was_asked",
)
# By each backend, with REDIRECT and TPROXY: apply, again (which reads back), real packets down every captured path, clean;
# the proxy, both ways.
SHORT = (
    *(f"{_CLEAN}[{backend}-{texts}]" for backend in _BACKENDS for texts in ("default", "tproxy")),
    *(f"{_AGAIN}[{backend}-{texts}]" for backend in _BACKENDS for texts in ("dns", "tproxy")),
    *(f"{_PACKETS}[{backend}-{texts}]" for backend in _BACKENDS for texts in ("redirect", "tproxy, UDP, DNS")),
    *(f"tests/proxy/test_captured.py::test_{name}" for name in _PROXY),
)
# A CNI suite goes here once there is one: its ADD and DEL need no more of the machine than these.
FULL = (
    "tests/netns",
    "tests/proxy/test_captured.py",
    "tests/proxy/test_lifecycle.py",
    "-m",
    "not torture",
    "-k",
    "not libiptc",
)
