"""Enable or disable in a process that dies by SIGKILL after a change: after the first, the second, and so on (`crashes`).

Step n is the moment after the n-th change to the kernel: a netlink request that writes, a program that writes, and each
COMMIT of a restore, as if it had been killed half-way.

`python -m tests.rig.crashing POD VERB [OPTION=TEXT ...]` forks for each step that stdin names, and answers how that ended: what
takes long, importing everything, is done once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyroute2  # noqa: F401  what changes routes imports it

from interceptor import capture
from interceptor.backends import netlink, process, routes
from interceptor.bpf import links, maps, places
from tests.rig.capturing import options

COMMIT = "COMMIT\n"
BPFFS = "ITC_T_BPFFS"  # the bpffs of the test that started us

REPOSITORY = Path(__file__).parents[2]


def crashes(pod: str, verb: str, texts: dict[str, str], most: int) -> Iterator[int]:
    """Kill a process that does `verb` in `pod` at step 0, 1 ...; ends with the step that is beyond its last change."""
    arguments = [f"{name}={text}" for name, text in texts.items()]
    argv = [sys.executable, "-m", "tests.rig.crashing", pod, verb, *arguments]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as template:
        assert template.stdin is not None
        assert template.stdout is not None
        for step in range(most):
            template.stdin.write(f"{step}\n")
            template.stdin.flush()
            ended = template.stdout.readline().strip()
            if ended == "0":
                assert step > 0, f"{verb} changed nothing"
                template.stdin.close()
                return
            assert ended == str(-signal.SIGKILL), f"step {step} of {verb}: {ended or 'no answer'}"
            yield step
        template.stdin.close()
    raise AssertionError(f"{verb} has more than {most} steps")


class Steps:
    """Counts changes, and dies after the one it is told."""

    def __init__(self, fatal: int) -> None:
        self.left = fatal

    def __call__(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def main(pod: str, step: int, verb: str, texts: dict[str, str]) -> int:
    changed = Steps(step)
    process.run = _stepwise(process.run, changed)
    netlink.request = _after(netlink.request, changed, _writes)
    for module, name in ((netlink, "transaction"), (routes, "_change_rule"), (routes, "_change_route")):
        setattr(module, name, _after(getattr(module, name), changed, lambda *_: True))
    _die_in_bpf(changed)
    places.BPFFS = os.environ.get(BPFFS, places.BPFFS)
    if verb == "enable":
        capture.enable(options(**texts), netns=pod)
    else:
        capture.disable(netns=pod)
    return 0


def _die_in_bpf(changed: Steps) -> None:
    for owner, name in (
        (maps.Map, "update"),
        (maps.Map, "delete"),
        (links.Link, "replace"),
        (links, "_create"),
        (links, "pin"),
        (os, "mkdir"),
        (os, "rmdir"),
        (os, "unlink"),
        (os, "rename"),
        (os, "symlink"),
    ):
        setattr(owner, name, _after(getattr(owner, name), changed, lambda *_: True))


def _after(function: Callable[..., Any], changed: Steps, writes: Callable[..., bool]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        if writes(*arguments):
            changed()
        return result

    return call


def _writes(_protocol: int, messages: Sequence[netlink.Message]) -> bool:
    return any(message.flags & netlink.NLM_F_DUMP != netlink.NLM_F_DUMP for message in messages)


def _stepwise(run: Callable[..., process.Result], changed: Steps) -> Callable[..., process.Result]:
    def call(argv: Sequence[str], *, stdin: str = "", **named: Any) -> process.Result:
        if COMMIT in _text(stdin) and 0 <= changed.left < _text(stdin).count(COMMIT):
            run(argv, stdin=_cut(stdin, changed.left + 1), **named)
            changed.left = 0
            changed()
        result = run(argv, stdin=stdin, **named)
        changed.left -= max(_text(stdin).count(COMMIT) - 1, 0)
        if stdin and '"verb": "save"' not in stdin:
            changed()
        return result

    return call


def _text(stdin: str) -> str:
    return str(json.loads(stdin)["text"]) if stdin.startswith("{") else stdin


def _cut(stdin: str, commits: int) -> str:
    text = COMMIT.join(_text(stdin).split(COMMIT)[:commits]) + COMMIT
    return json.dumps({**json.loads(stdin), "text": text}) if stdin.startswith("{") else text


def template(pod: str, verb: str, texts: dict[str, str]) -> None:
    """Answer each line of stdin, the number of a step, with how the process that did it ended: as Popen.returncode."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = main(pod, int(line), verb, texts)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    given = dict(item.split("=", 1) for item in sys.argv[3:])
    template(sys.argv[1], sys.argv[2], given)
