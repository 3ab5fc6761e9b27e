"""What the plugin does to the kernel: by `interceptor.capture`, in the pod's network namespace."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from cni import protocol
from cni.protocol import CniError, Request
from interceptor import netns
from interceptor.errors import ConfigError, InterceptorError, Problem

if TYPE_CHECKING:
    from cni.entry import Entry
    from cni.pod import Capture, Decision

# Each verb imports what it needs, and a DEL needs little: no option, no plan.


class Ops(Protocol):
    """The verbs behind the commands. All raise InterceptorError."""

    def refuse_own_netns(self, request: Request) -> None:
        """Raise CniError when the pod's namespace is the caller's own (skel's check; CNI_NETNS_OVERRIDE allows it)."""

    def decide(self, request: Request, entry: Entry) -> Decision:
        """Whether and how this pod is captured."""

    def enable(self, request: Request, wanted: Capture) -> Iterable[str]:
        """Write the rules, read back; gives warnings."""

    def differences(self, request: Request, wanted: Capture) -> list[str]:
        """How the kernel differs from the plan; empty when it does not."""

    def disable(self, request: Request) -> None:
        """Take away what is ours; succeeds when there is nothing."""

    def status(self, entry: Entry) -> None:
        """Raise CniError when an ADD would fail now."""


class InProcess:
    """The verbs carried out by this process."""

    def refuse_own_netns(self, request: Request) -> None:
        """See Ops."""
        if not request.may_be_own_netns and netns.identity(request.netns) == netns.identity():
            raise CniError(protocol.INVALID_NETNS, f"CNI_NETNS {request.netns} is the network namespace of the runtime itself")

    def decide(self, request: Request, entry: Entry) -> Decision:
        """See Ops."""
        from cni import pod

        return pod.decide(request, entry)

    def enable(self, request: Request, wanted: Capture) -> Iterable[str]:
        """See Ops."""
        from interceptor import capture

        return capture.enable(wanted.config, netns=request.netns, resolvers=resolvers_for(wanted)).warnings

    def differences(self, request: Request, wanted: Capture) -> list[str]:
        """See Ops."""
        from interceptor import capture

        found = capture.check(wanted.config, netns=request.netns, resolvers=resolvers_for(wanted))
        return [str(difference) for difference in found.differences]

    def disable(self, request: Request) -> None:
        """See Ops."""
        # A dead pid, a namespace that was deleted, a file that was left: nothing to take rules from.
        if os.path.exists(request.netns):
            from interceptor import release

            release.disable(netns=request.netns)

    def status(self, entry: Entry) -> None:
        """See Ops."""
        from cni import pod
        from interceptor import capture

        decision = pod.decide(Request("STATUS"), entry)
        try:
            if isinstance(decision, pod.Capture):
                capture.usable(decision.config)
        except InterceptorError as error:
            raise CniError(protocol.NOT_AVAILABLE, "this host cannot write capture rules", str(error)) from error


def resolvers_for(wanted: Capture) -> tuple[str, ...]:
    """The pod's name servers, where they are needed. Raises ConfigError when they are, and nobody told."""
    if wanted.config.dns == "resolv-conf" and wanted.resolvers is None:
        expected = (
            'the runtime does not say the pod\'s name servers: declare the capability ("capabilities": {"dns": true}) '
            "or capture DNS to any server with all"
        )
        raise ConfigError([Problem("capture.dns", "resolv-conf", expected)])
    return wanted.resolvers or ()
