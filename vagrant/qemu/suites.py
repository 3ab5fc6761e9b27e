"""Which kernels there are, what each lacks, and which tests run on it, as arguments of pytest.

`python -m vagrant.qemu.suites KERNEL WORDS` prints them, a line each, for machines of Vagrant: "short" and "full" in WORDS are
the lists of here, all else is pytest's.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator

from tests.rig.kernel import NFT_ONLY

# By the Debian suite it comes from. The newest is first: what breaks there is news, and it takes longest.
# Its own tools matter as much: nft 1.1 lists rules otherwise than 1.0.
USERLANDS = {"6.12": "trixie"}
KERNELS = {"6.12": "trixie", "6.1": "bookworm", "5.10": "bullseye"}
# doctor's name for it -> a command of interceptor that needs it; guest/test_kernel.py holds doctor and the command to it.
PACKET_SPLICE = {"packet splice": "proxy --relay packet"}
LACKS: dict[str, dict[str, str]] = {
    "6.12": {},
    "6.1": PACKET_SPLICE,
    "5.10": {
        **PACKET_SPLICE,
        "cgroup match": "init --proxy-cgroup some",
        "connect-time capture": "init --outbound connect --inbound off --capture-cgroup /",
    },
}
# libiptc's workers take seconds a call under emulation; it has variants of its own, and one test where iptables is newer:
# what python-iptables knows of libxtables changes with it.
_BACKENDS = ("nft",) if NFT_ONLY else ("nft", "iptables-nft", "iptables-legacy")
_CLEAN = "tests/netns/test_contract_lifecycle.py::test_disable_leaves_everything_as_it_was"
# What two variants of iptables share is conntrack's; whether it may go while rules name it differs between kernels.
_TAKEOVER = "tests/netns/test_contract_lifecycle.py::test_another_backends_rules_are_removed[iptables-nft]"
# Where the kernel said more of a rule than we know, all else would work too, and more slowly.
_NO_PROGRAM = "tests/netns/test_nft_bytes.py::test_no_program_is_started"
_PACKETS = "tests/netns/test_probe.py::test_every_captured_path_is_proved"
_PROXY = (
    "outbound_redirect_reaches_the_original_destination",
    "inbound_redirect_reaches_the_application_from_the_passthrough_address",
    "outbound_tproxy_reaches_the_original_destination",
    "inbound_tproxy_reaches_the_application",
)
_CNI = (
    "test_add.py::test_tproxys_routes_come_and_go[static-1330]",
    "test_delete_check.py::test_del_gives_the_namespace_back_as_it_was[static]",
)
_CONNECT = "tests/e2e/test_connect.py::test_captured_reported_and_hidden_from_the_application[v4]"
FULL = (
    "tests/netns",
    "tests/proxy/test_captured.py",
    "tests/proxy/test_lifecycle.py",
    "-m",
    "not torture",
    "-k",  # looks at names, parameters and markers
    "not libiptc and not iptables" if NFT_ONLY else "not libiptc",
)


def kernel_tests(release: str) -> tuple[str, ...]:
    """That doctor tells what the kernel lacks, and what needs it is refused; the latter only where it lacks something.

    None on a kernel of which we do not know what it lacks.
    """
    if release not in LACKS:
        return ()
    names = (
        "doctor_says_what_this_kernel_lacks",
        *(["what_needs_it_is_refused_and_nothing_is_changed"] if LACKS[release] else []),
    )
    return tuple(f"vagrant/qemu/guest/test_kernel.py::test_{name}" for name in names)


def short(release: str) -> tuple[str, ...]:
    """What CI can afford.

    What the kernel lacks; nft's rules without nft; by each backend: apply and real packets down every captured path, with
    REDIRECT and with TPROXY, and clean, which with TPROXY has routes to remove as well; a change of backends; the proxy, both
    ways; the CNI plugin's static file: ADD and DEL; capture at connect(), where there is.
    """
    return (
        *kernel_tests(release),
        _NO_PROGRAM,
        *(f"{_CLEAN}[{backend}-tproxy]" for backend in _BACKENDS),
        *([f"{_CLEAN}[libiptc-default]"] if release in USERLANDS and not NFT_ONLY else []),
        *(() if NFT_ONLY else (_TAKEOVER,)),
        *(f"{_PACKETS}[{backend}-{texts}]" for backend in _BACKENDS for texts in ("redirect", "tproxy, UDP, DNS")),
        *(f"tests/proxy/test_captured.py::test_{name}" for name in _PROXY),
        *(f"tests/cni/{name}" for name in _CNI),
        *(() if "connect-time capture" in LACKS.get(release, {}) else (_CONNECT,)),
    )


def arguments(release: str, words: str) -> Iterator[str]:
    """Of pytest, for `words` as a shell would split them."""
    lists = {"short": short(release), "full": (*kernel_tests(release), *FULL)}
    for word in shlex.split(words):
        yield from lists.get(word, (word,))


if __name__ == "__main__":
    print(*arguments(*sys.argv[1:]), sep="\n")
