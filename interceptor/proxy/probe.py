"""Answer a captured probe: say which listener took it and where it was going. `interceptor probe` reads the answer."""

from __future__ import annotations

import json
import socket
from select import EPOLLIN

from interceptor.proxy.loop import Loop
from interceptor.proxy.settings import Listener
from interceptor.sockets import SockAddr, sockaddr_text

# A prober closes as soon as it has read its line; one that does not is not worth a descriptor.
DEADLINE_S = 5.0


class ProbeAnswer:
    """One answered probe.

    Line and FIN are sent at once, then the prober's own end is awaited, so that no RST overtakes the line.
    """

    def __init__(
        self, loop: Loop, sock: socket.SocketType, listener: Listener, client: SockAddr, original_dst: SockAddr
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._deadline = loop.later(DEADLINE_S, self._end)
        loop.watch(sock.fileno(), EPOLLIN, self._ready)
        answer = {"listener": str(listener), "original_dst": sockaddr_text(original_dst), "client": sockaddr_text(client)}
        try:
            sock.send(json.dumps(answer).encode() + b"\n")
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._end()  # the prober is gone

    def _ready(self, _events: int) -> None:
        try:
            if self._sock.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # reset: over as well
        self._end()

    def _end(self) -> None:
        self._deadline.cancel()
        self._loop.dispose(self._sock)
