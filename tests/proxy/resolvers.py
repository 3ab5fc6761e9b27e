"""DNS servers and clients of the tests' own, in network namespaces, over both transports. dnspython reads and writes here."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from tests.proxy.pods import DEADLINE_S, Pods, client, listen

# From a query and "udp" or "tcp" to the answer, its bytes, or None for silence.
Script = Callable[[dns.message.Message, str], dns.message.Message | bytes | None]

ADDRESSES = {"A": ["198.18.0.1", "198.18.0.2"], "AAAA": ["2001:db8::1"]}
SOA = "ns.test. admin.test. 1 2 3 4 {minimum}"


def answer(query: dns.message.Message, *records: dns.rrset.RRset, rcode: int = 0) -> dns.message.Message:
    """`query` answered by `records`."""
    made = dns.message.make_response(query, recursion_available=True)
    made.set_rcode(dns.rcode.Rcode(rcode))
    made.answer.extend(records)
    return made


def negative(query: dns.message.Message, rcode: int = 0, ttl: int = 300, minimum: int = 60) -> dns.message.Message:
    """`query` answered by "there is none"."""
    made = answer(query, rcode=rcode)
    made.authority.append(dns.rrset.from_text("test.", ttl, "IN", "SOA", SOA.format(minimum=minimum)))
    return made


def usual(query: dns.message.Message, _transport: str) -> dns.message.Message:
    """A and AAAA for all names; for those that begin with v4, no AAAA; with no, nothing. Nothing of other types."""
    [question] = query.question
    kind = question.rdtype.name
    first = question.name.labels[0].lower()
    if first.startswith(b"no"):
        return negative(query, rcode=3)
    if kind not in ADDRESSES or (first.startswith(b"v4") and kind == "AAAA"):
        return negative(query)
    return answer(query, dns.rrset.from_text(question.name, 300, "IN", kind, *ADDRESSES[kind]))


class Server:
    """Answers by `script` on one address; `seen` are the queries, each with its transport and its client's port."""

    def __init__(self, where: str, ip: str, port: int, script: Script) -> None:
        self.script = script
        self.seen: list[tuple[dns.message.Message, str, int]] = []
        self._datagrams = listen(where, ip, port, socket.SOCK_DGRAM)
        self._streams = listen(where, ip, port)
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._stop.close()
        self._thread.join(DEADLINE_S)
        for each in (self._datagrams, self._streams, self._stopped):
            each.close()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._datagrams, self._streams, self._stopped], [], [])
            if self._stopped in ready:
                return
            if self._datagrams in ready:
                message, peer = self._datagrams.recvfrom(65535)
                made = self._answer(message, "udp", peer[1])
                if made is not None:
                    self._datagrams.sendto(made, peer)
            if self._streams in ready:
                accepted, peer = self._streams.accept()
                with accepted:
                    made = self._answer(receive(accepted), "tcp", peer[1])
                    if made is not None:
                        accepted.sendall(len(made).to_bytes(2) + made)

    def _answer(self, message: bytes, transport: str, port: int) -> bytes | None:
        query = dns.message.from_wire(message)
        self.seen.append((query, transport, port))
        made = self.script(query, transport)
        return made.to_wire(max_size=65535) if isinstance(made, dns.message.Message) else made


@contextmanager
def server(where: str, ip: str, port: int = 5353, script: Script = usual) -> Iterator[Server]:
    """A server in namespace `where`; gone after the block."""
    made = Server(where, ip, port, script)
    try:
        yield made
    finally:
        made.close()


def receive(sock: socket.socket) -> bytes:
    """One message over TCP."""
    length = int.from_bytes(sock.recv(2, socket.MSG_WAITALL))
    return sock.recv(length, socket.MSG_WAITALL)


def send(sock: socket.socket, *messages: bytes) -> None:
    """Messages over TCP, in one go."""
    sock.sendall(b"".join(len(each).to_bytes(2) + each for each in messages))


class Stub:
    """A client in the pod that asks `ip`, port 53, as an application would."""

    def __init__(self, made: Pods, ip: str, port: int = 53) -> None:
        self.sock = client(made.pod, ip, port, socket.SOCK_DGRAM)
        self.to = (made.pod, ip, port)

    def ask(self, name: str, kind: str = "A", **options: object) -> dns.message.Message:
        """The answer over UDP, which fits the question."""
        query = dns.message.make_query(name, kind, **options)  # type: ignore[arg-type]
        self.sock.send(query.to_wire())
        response = dns.message.from_wire(self.sock.recv(65535))
        assert query.is_response(response)
        return response

    def ask_tcp(self, name: str, kind: str = "A", **options: object) -> dns.message.Message:
        """The answer over TCP."""
        query = dns.message.make_query(name, kind, **options)  # type: ignore[arg-type]
        with client(*self.to) as sock:
            send(sock, query.to_wire())
            response = dns.message.from_wire(receive(sock))
        assert query.is_response(response)
        return response


@contextmanager
def stub(made: Pods, ip: str, port: int = 53) -> Iterator[Stub]:
    """A Stub; closed after the block."""
    one = Stub(made, ip, port)
    try:
        yield one
    finally:
        one.sock.close()
