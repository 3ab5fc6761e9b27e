"""A small DNS server, UDP and TCP, port 53: any name has the world's A and AAAA address. Says "ready" when it listens."""

from __future__ import annotations

import selectors
import socket
import struct

A, AAAA = 1, 28
ADDRESSES = {A: socket.inet_pton(socket.AF_INET, "198.18.0.2"), AAAA: socket.inet_pton(socket.AF_INET6, "2001:db8:5::2")}


def answer(query: bytes) -> bytes:
    end = query.index(b"\0", 12) + 5
    (kind,) = struct.unpack_from("!H", query, end - 4)
    records = b""
    if kind in ADDRESSES:
        records = struct.pack("!HHHIH", 0xC00C, kind, 1, 60, len(ADDRESSES[kind])) + ADDRESSES[kind]
    header = query[:2] + struct.pack("!HHHHH", 0x8580, 1, bool(records), 0, 0)
    return header + query[12:end] + records


def serve_datagram(sock: socket.socket) -> None:
    query, peer = sock.recvfrom(4096)
    sock.sendto(answer(query), peer)


def serve_stream(sock: socket.socket) -> None:
    connection, _ = sock.accept()
    with connection:
        connection.settimeout(5)
        (length,) = struct.unpack("!H", connection.recv(2, socket.MSG_WAITALL))
        reply = answer(connection.recv(length, socket.MSG_WAITALL))
        connection.sendall(struct.pack("!H", len(reply)) + reply)


selector = selectors.DefaultSelector()
datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
datagrams.bind(("::", 53))
streams = socket.create_server(("::", 53), family=socket.AF_INET6, dualstack_ipv6=True)
selector.register(datagrams, selectors.EVENT_READ, serve_datagram)
selector.register(streams, selectors.EVENT_READ, serve_stream)
print("ready", flush=True)
while True:
    for key, _ in selector.select():
        key.data(key.fileobj)
