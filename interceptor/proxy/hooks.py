"""Where other modules put a hand in: each hook with when it is called and what it may cost. Does nothing by itself.

None means that nobody is interested, and is all a connection then pays for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from interceptor.proxy.settings import Listener
from interceptor.sockets import SockAddr

if TYPE_CHECKING:
    from interceptor.proxy.connection import Connection

# (listener, client, original destination) -> the reason to refuse it, or None. Before anything is opened: a refused
# connection costs an accept and a RST. Each connection that was let in is `ended` once.
Admit: TypeAlias = Callable[[Listener, SockAddr, SockAddr], str | None]
# What the client said so far, not taken from its socket, empty once it has ended -> whether that is enough to dial.
Hear: TypeAlias = Callable[["Connection", bytes], bool]
# What the upstream is to be sent before anything of the client's, as by the PROXY protocol. Called when it is open.
Preface: TypeAlias = Callable[["Connection"], bytes]
OnConnection: TypeAlias = Callable[["Connection"], None]


@dataclass(slots=True)
class Hooks:
    """All of them. `Proxy.hooks` is set before `run`."""

    admit: Admit | None = None
    opened: OnConnection | None = None  # the upstream is open
    hear: Hear | None = None
    preface: Preface | None = None
    ended: OnConnection | None = None  # after its record was written


# How much of the client's first bytes `hear` is shown: a TLS ClientHello with post-quantum key shares is 2 KiB, its limit 16.
HEARD_SIZE = 16 * 1024
# How long to wait for them: a client that waits for the server's greeting must not wait much longer (Istio's old protocol
# detection timeout was this long; linkerd waits 10 s and people notice).
HEAR_TIMEOUT_S = 0.1
