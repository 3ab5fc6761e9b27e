"""The command line's edge: runs the command, turns our errors into a message and an exit code (docs/exit-codes.md)."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from interceptor.errors import ConfigError, InterceptorError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
FAILED = 1
# Not what we did wrong: what this process, or the disk that the output goes to, has no more of.
EXHAUSTED = {
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "the machine has no more (sysctl fs.file-max)",
    errno.ENOMEM: "the kernel, or this cgroup, has no memory left",
    errno.ENOSPC: "the output, or a temporary file, could not be written",
}
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(args: Sequence[str] | None = None) -> int:
    """Run the command in `args` (None: this process's arguments) and give its exit code."""
    given = list(sys.argv[1:] if args is None else args)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does: a name that the locale can't write is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(given)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _write_no_more(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in EXHAUSTED:
            raise
        _write_no_more(sys.stdout)
        _complain(f"{error.strerror}: {EXHAUSTED[error.errno]}")
        return FAILED
    return code


def _write_no_more(stream: TextIO) -> None:
    # The interpreter flushes it once more on its way out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(message: str) -> None:
    try:
        for line in message.splitlines():
            print(f"interceptor: {line}", file=sys.stderr, flush=True)
    except OSError:  # nobody hears it; the exit code says what it can
        _write_no_more(sys.stderr)


def _run(args: list[str]) -> int:
    import click

    from interceptor.cli import cli
    from interceptor.cli.options import JSON

    meta: dict[str, Any] = {}
    try:
        # Not cli.main(), which turns an interrupt and a closed pipe into exceptions and codes of its own.
        with cli.make_context("interceptor", args or ["--help"]) as context:
            meta = context.meta
            return int(cli.invoke(context))
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        used = error.ctx if isinstance(error, click.UsageError) else None
        where = used.command_path if used is not None else "interceptor"
        message = f"{error.format_message()} (`{where} --help` shows what there is)"
        # click may have stopped before it came to --json. What follows -- is another program's.
        wants_json = "--json" in (args[: args.index("--")] if "--" in args else args)
        return _report(wants_json, "UsageError", message, error.exit_code)
    except InterceptorError as error:
        return _report(meta.get(JSON, False), type(error).__name__, str(error), error.exit_code, error)


def _report(as_json: bool, kind: str, message: str, code: int, error: InterceptorError | None = None) -> int:
    if not as_json:
        _complain(message)
        return code
    import json

    problems = error.problems if isinstance(error, ConfigError) else ()
    listed = [{"option": item.option, "value": item.value, "expected": item.expected} for item in problems]
    print(json.dumps({"error": {"kind": kind, "message": message, "exit_code": code, "problems": listed}}))
    return code


if __name__ == "__main__":
    sys.exit(main())
