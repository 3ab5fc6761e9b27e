"""`python -m tests.rig.crashing POD STEP VERB [OPTION=TEXT ...]`: enable or disable, and die by SIGKILL at a step.

The steps are the moments before and after each change to the kernel: a program that writes, or a netlink request that
does. Exits 0 when STEP is beyond the last.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from interceptor import capture
from interceptor.backends import netlink, process, routes
from tests.rig.capturing import options


def main(pod: str, step: int, verb: str, texts: dict[str, str]) -> int:
    moments = itertools.count()

    def watched(function: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not changes(*arguments, **named):
                return function(*arguments, **named)
            _die_at(step, moments)
            try:
                return function(*arguments, **named)
            finally:
                _die_at(step, moments)

        return call

    process.run = watched(process.run, _writes)
    for module, name in (
        (netlink, "request"),
        (netlink, "transaction"),
        (routes, "_change_rule"),
        (routes, "_change_route"),
    ):
        setattr(module, name, watched(getattr(module, name), lambda *_, **__: True))
    if verb == "enable":
        capture.enable(options(**texts), netns=pod)
    else:
        capture.disable(netns=pod)
    return 0


def _writes(argv: list[str], *, stdin: str = "", **_: Any) -> bool:
    return not (argv[0].endswith("-save") or "list" in argv or '"verb": "save"' in stdin)


def _die_at(step: int, moments: Any) -> None:
    if next(moments) == step:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    given = dict(item.split("=", 1) for item in sys.argv[4:])
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], given))
