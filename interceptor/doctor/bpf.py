"""What our BPF programs can do here. Each is tried as the product uses it, in a network namespace that is thrown away.

Packet splice moves bytes there by its self-test; capture at connect() is switched on, read back, and off again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

from interceptor import capture
from interceptor.backends import at_connect, cgroups
from interceptor.config import Config
from interceptor.doctor.finding import Finding
from interceptor.errors import InterceptorError, NetnsError
from interceptor.facts import pod_cgroup
from interceptor.netns import thrown_away

# No rules: those are tried by mechanisms.py.
CONNECT = Config(outbound="connect", inbound="off")


def findings() -> Iterator[Finding]:
    """Whether each can be used by this process, on this kernel."""
    yield _finding("packet splice", "for --relay packet, which auto takes where it works", _try_packet_splice)
    yield _finding("connect-time capture", "for --outbound connect", _try_connect)


def _finding(name: str, used_by: str, attempt: Callable[[], None]) -> Finding:
    try:
        with thrown_away():
            attempt()
    except NetnsError as error:
        return Finding("bpf", name, "unknown", f"not tried: {error}", "run doctor as root")
    except InterceptorError as error:
        return Finding("bpf", name, "missing", str(error), used_by)
    return Finding("bpf", name, "ok", "works")


def _try_packet_splice() -> None:
    from interceptor.proxy.relay import choice  # all of the proxy: 50 ms

    chosen = choice.choose("packet", workers=1)
    if chosen.attached is not None:
        chosen.attached.close()


def _try_connect() -> None:
    """Pins are no part of the network namespace: they are taken away by hand. A failed enable() has left none."""
    cgroups.mount_point()
    capture.enable(dataclasses.replace(CONNECT, capture_cgroup=pod_cgroup(str(os.getpid()))))
    at_connect.switch_off()
