"""Close one half of a flow so that its peer sees what it would have seen without us. Decides nothing about when."""

from __future__ import annotations

import errno
from socket import SHUT_WR, SocketType

from interceptor.proxy.loop import Loop
from interceptor.sockets import reset_on_close, unacknowledged

# A reset throws away what the peer has not acknowledged. Without us those bytes would have been with the peer before the
# RST came: so they get a moment. A peer that has stopped reading loses them, as it may with any reset.
GRACE_S = 1.0
RECHECK_S = 0.005


def end_stream(sock: SocketType) -> None:
    """Send FIN, behind what is queued; the peer may still speak."""
    try:
        sock.shutdown(SHUT_WR)
    except OSError as error:
        # Reset meanwhile: the relay is about to report it.
        if error.errno != errno.ENOTCONN:
            raise


def finish(loop: Loop, sock: SocketType) -> None:
    """Close with FIN; the kernel delivers what is queued."""
    loop.dispose(sock)


def abort(loop: Loop, sock: SocketType) -> None:
    """Close with RST at once, whatever is queued."""
    reset_on_close(sock)
    loop.dispose(sock)


def abort_after_delivery(loop: Loop, sock: SocketType) -> None:
    """Close with RST, once the peer has what was written before, or GRACE_S has passed."""
    loop.unwatch(sock.fileno())
    reset_on_close(sock)  # now already: should the proxy end meanwhile, that is how the kernel closes it
    _abort_when_delivered(loop, sock, GRACE_S)


def _abort_when_delivered(loop: Loop, sock: SocketType, left_s: float) -> None:
    if left_s <= 0 or not unacknowledged(sock):
        abort(loop, sock)
    else:
        loop.later(RECHECK_S, lambda: _abort_when_delivered(loop, sock, left_s - RECHECK_S))
