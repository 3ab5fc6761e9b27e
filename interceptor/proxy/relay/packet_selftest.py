"""Does packet splice work here, with this kernel, in this namespace? Asked of real sockets on lo, before anybody depends on it.

A client, a server and between them a flow, once a family: its bytes must arrive, our own two sockets must not see one, and
its end must be reported. Real devices are not tried: what they answer differently shows at each flow's handshake.
"""

from __future__ import annotations

import errno
import select
import socket
from contextlib import ExitStack, closing

from interceptor.proxy.relay import packet_layout as layout
from interceptor.proxy.relay.packet_attach import Attached
from interceptor.proxy.relay.packet_layout import Asked
from interceptor.proxy.relay.packet_table import FlowTable, fall_silent

# On lo every step takes microseconds; a machine that is busy starting everything at once may take a while.
STEP_S = 2.0
LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
UP, DOWN = b"is anybody there?", b"yes"


class _Failed(Exception):
    """What did not happen."""


def problem(attached: Attached) -> str | None:
    """Why packet splice cannot be used here; None when it can."""
    table = FlowTable(attached, 0)
    try:
        for family, address in LOOPBACKS:
            try:
                _try(table, family, address)
            except OSError as error:
                # Without IPv6 there is no address to bind, and nothing to splice.
                if family == socket.AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    continue
                return f"self-test on {address}: {error.strerror or error}"
            except _Failed as failed:
                return f"self-test on {address}: {failed}"
    finally:
        table.let_go()
    return None


def _try(table: FlowTable, family: socket.AddressFamily, address: str) -> None:
    with ExitStack() as stack:

        def kept(sock: socket.socket) -> socket.socket:
            sock.settimeout(STEP_S)
            return stack.enter_context(closing(sock))

        listener, server = (kept(socket.socket(family, socket.SOCK_STREAM)) for _ in range(2))
        for each in (listener, server):
            each.bind((address, 0))
        port = listener.getsockname()[1]
        table.prepare_listener(listener, 0)
        stack.callback(table.leave_listener, port)
        for each in (listener, server):
            each.listen(1)
        client = kept(socket.create_connection((address, port), STEP_S))
        accepted = kept(listener.accept()[0])
        upstream = kept(socket.socket(family, socket.SOCK_STREAM))
        flow_id = table.begin(accepted, upstream, Asked.HELD)
        stack.callback(table.forget, [flow_id])
        upstream.connect(server.getsockname())
        far = kept(server.accept()[0])
        refusal = table.refusal(flow_id)
        if refusal is not None:
            raise _Failed(f"the handshakes do not fit: {refusal}")
        _converse(client, far)
        for sock in (accepted, upstream):
            if select.select([sock], [], [], 0)[0]:
                raise _Failed("packets came to the proxy's own sockets")
        client.close()
        far.close()
        _await_end(table, flow_id)
        fall_silent(accepted)
        fall_silent(upstream)


def _converse(client: socket.socket, far: socket.socket) -> None:
    for speaker, listener, said in ((client, far, UP), (far, client, DOWN)):
        speaker.sendall(said)
        try:
            heard = listener.recv(len(said))
        except TimeoutError:
            raise _Failed("translated packets do not arrive") from None
        if heard != said:
            raise _Failed(f"{said!r} arrived as {heard!r}")


def _await_end(table: FlowTable, flow_id: int) -> None:
    ring = table.rings[0]
    while select.select([ring], [], [], STEP_S)[0]:
        for record in ring.read():
            event = layout.unpack_event(record)
            if event.flow != flow_id:
                continue
            if (event.sent, event.received) != (len(UP), len(DOWN)):
                raise _Failed(f"{event.sent} and {event.received} bytes were counted, not {len(UP)} and {len(DOWN)}")
            return
    raise _Failed("its end was not reported")
