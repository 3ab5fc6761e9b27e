"""Which kernels there are, and which tests run on each, as arguments of pytest."""

from __future__ import annotations

# By the Debian suite it comes from. The newest is first: what breaks there is news.
KERNELS = {"6.12": "trixie", "6.1": "bookworm", "5.10": "bullseye"}
# Of every backend but libiptc, whose worker takes seconds a call under emulation: apply, real packets down every captured
# path, clean; TPROXY; the proxy itself, in both directions.
SHORT = (
    "tests/netns/test_contract_lifecycle.py::test_disable_leaves_everything_as_it_was",
    "tests/netns/test_probe.py::test_every_captured_path_is_proved",
    "tests/proxy/test_captured.py",
    "-k",
    "not libiptc and (default or tproxy or redirect or reaches_the) and not refused and not 'v4-only'",
)
# A CNI suite goes here once there is one: its ADD and DEL need no more of the machine than these.
FULL = (
    "tests/netns",
    "tests/proxy/test_captured.py",
    "tests/proxy/test_lifecycle.py",
    "-m",
    "not torture",
    "-k",
    "not libiptc or (test_disable_leaves and default)",
)
