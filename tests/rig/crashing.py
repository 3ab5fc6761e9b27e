"""`python -m tests.rig.crashing POD STEP VERB [OPTION=TEXT ...]`: enable or disable, and die by SIGKILL at a step.

A step is the moment before, or after, something is sent to the kernel: a program run, a netlink request, a sysctl or
route change. Exits 0, after printing how many there were, when STEP is beyond the last.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from interceptor import capture
from interceptor.backends import address, cttimeout, process, routes
from tests.rig.capturing import options

CHANGES: tuple[tuple[Any, str], ...] = (
    (process, "run"),
    (cttimeout, "ensure"),
    (cttimeout, "remove"),
    (routes, "ensure"),
    (address, "add_inbound_source"),
    (address, "remove_inbound_source"),
)


def main(pod: str, step: int, verb: str, texts: dict[str, str]) -> int:
    moments = itertools.count()

    def moment() -> None:
        if next(moments) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    for module, name in CHANGES:
        setattr(module, name, _with_moments(getattr(module, name), moment))
    if verb == "enable":
        capture.enable(options(**texts), netns=pod)
    else:
        capture.disable(netns=pod)
    return 0


def _with_moments(function: Callable[..., Any], moment: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        moment()
        result = function(*arguments, **named)
        moment()
        return result

    return wrapped


if __name__ == "__main__":
    given = dict(item.split("=", 1) for item in sys.argv[4:])
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], given))
