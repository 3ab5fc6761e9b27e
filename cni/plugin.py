"""What each CNI command does. One function for the script, the static file and the node agent; the kernel is behind `ops`.

Errors are caught here: a runtime gets an error object, never a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from cni import protocol
from cni.protocol import CniError, JsonObject, Request
from interceptor.errors import BackendError, ConfigError, InterceptorError, NetnsError, Unsupported

if TYPE_CHECKING:
    from cni.entry import Entry
    from cni.ops import Ops

Result: TypeAlias = tuple[int, JsonObject | None]

FAILURE = 1
CODES: dict[type[InterceptorError], int] = {
    ConfigError: protocol.INVALID_CONFIG,
    NetnsError: protocol.INVALID_NETNS,
    BackendError: protocol.CAPTURE_FAILED,
    Unsupported: protocol.UNSUPPORTED_HOST,
}


def process(environment: Mapping[str, str], stdin: bytes, ops: Ops, say: Callable[[str], None] | None = None) -> Result:
    """Carry out one request: (exit status, what to print on stdout). `say` gets what an operator should see on stderr."""
    say = say or _to_stderr
    try:
        return 0, _answer(environment, stdin, ops, say)
    except CniError as error:
        return FAILURE, error.to_json(protocol.error_version(stdin))
    except Exception as error:  # noqa: BLE001 - the edge: a runtime understands an error object, and no traceback
        import traceback  # 5 ms, and a bug of ours

        say(traceback.format_exc())
        unexpected = CniError(protocol.INTERNAL, "interceptor-cni has a bug", f"{type(error).__name__}: {error}")
        return FAILURE, unexpected.to_json(protocol.error_version(stdin))


def not_done(environment: Mapping[str, str], stdin: bytes, error: CniError, say: Callable[[str], None]) -> Result:
    """The answer to a request that nobody could carry out: `error`, but for an ADD whose entry lets such pods through."""
    from cni import entry

    try:
        if protocol.command_of(environment) == "ADD":
            request = protocol.parse(environment, stdin)
            result = protocol.passed_on(request)
            _let_through(request, entry.read(request.config), error, say)
            return 0, result
    except CniError as found:
        error = found
    return FAILURE, error.to_json(protocol.error_version(stdin))


def _answer(environment: Mapping[str, str], stdin: bytes, ops: Ops, say: Callable[[str], None]) -> JsonObject | None:
    if protocol.command_of(environment) == "VERSION":
        return protocol.versions()
    request = protocol.parse(environment, stdin)
    match request.command:
        case "ADD":
            return _add(request, ops, say)
        case "CHECK":
            _check(request, ops)
        case "DEL":
            _delete(request, ops, say)
        case "STATUS":
            from cni import entry

            _as_cni(ops.status, entry.read(request.config))
        case _:
            # GC: all that we make is in the pod's own namespace and goes with it, so nothing of ours outlives an attachment.
            pass
    return None


def _add(request: Request, ops: Ops, say: Callable[[str], None]) -> JsonObject:
    from cni import entry

    result = protocol.passed_on(request)
    configured = entry.read(request.config)
    try:
        _as_cni(_capture, request, configured, ops, say)
    except CniError as error:
        _let_through(request, configured, error, say)
    return result


def _let_through(request: Request, configured: Entry, error: CniError, say: Callable[[str], None]) -> None:
    """Raises `error`, where the entry does not say that such a pod starts all the same."""
    if configured.on_failure == "block" or error.code == protocol.INVALID_NETNS:
        raise error
    say(f"{_name(request)}: NOT captured, since onFailure is bypass: {error}")


def _capture(request: Request, configured: Entry, ops: Ops, say: Callable[[str], None]) -> None:
    from cni.pod import Capture, Skip

    ops.refuse_own_netns(request)
    decision = ops.decide(request, configured)
    match decision:
        case Skip(reason):
            say(f"{_name(request)}: not captured: {reason}")
        case Capture():
            for warning in ops.enable(request, decision):
                say(f"{_name(request)}: {warning}")


def _check(request: Request, ops: Ops) -> None:
    from cni import entry

    configured = entry.read(request.config)
    protocol.passed_on(request)
    _as_cni(_compare, request, configured, ops)


def _compare(request: Request, configured: Entry, ops: Ops) -> None:
    from cni.pod import Skip

    ops.refuse_own_netns(request)
    decision = ops.decide(request, configured)
    if isinstance(decision, Skip):
        return
    differences = ops.differences(request, decision)
    if differences:
        shown = "; ".join(differences[:5]) + ("; …" if len(differences) > 5 else "")
        raise CniError(protocol.DRIFTED, f"the capture rules differ from the plan in {len(differences)} places", shown)


def _delete(request: Request, ops: Ops, say: Callable[[str], None]) -> None:
    # Section 2, DEL: must end well though things are missing. libcni stops at the first error, and the address of a pod whose
    # deletion failed is lost.
    if not request.netns:
        return
    try:
        ops.refuse_own_netns(request)
        ops.disable(request)
    except (CniError, InterceptorError) as error:
        say(f"{_name(request)}: DEL: left as it is: {error}")


def _as_cni(step: Callable[..., None], *arguments: object) -> None:
    try:
        step(*arguments)
    except InterceptorError as error:
        code = CODES.get(type(error), protocol.INTERNAL)
        raise CniError(code, "the pod's traffic cannot be captured", str(error)) from error


def _name(request: Request) -> str:
    pod = request.args.get("K8S_POD_NAME")
    return f"{request.args.get('K8S_POD_NAMESPACE', '')}/{pod}" if pod else request.container_id


def _to_stderr(message: str) -> None:
    if sys.stderr is not None:
        print(f"interceptor-cni: {message}", file=sys.stderr)
