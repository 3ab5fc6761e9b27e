"""Open connections, make one request on each, and hold them. A program of its own, started inside a namespace.

python hold.py HOST PORT[,PORT...] FIRST ALL: opens FIRST, prints "warm", waits for a line, opens the rest up to ALL, prints
"held", waits for the end of stdin.
"""

from __future__ import annotations

import resource
import select
import socket
import sys
import time

AT_ONCE = 256
DEADLINE_S = 60.0
REQUEST = b"GET / HTTP/1.1\r\nHost: held\r\n\r\n"


def open_more(host: str, ports: list[int], count: int, held: list[socket.socket], deadline: float) -> None:
    """Open `count` connections, AT_ONCE in flight; each is there once its request is answered."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    poll = select.epoll()
    pending: dict[int, socket.socket] = {}
    begun = 0
    while begun < count or pending:
        while begun < count and len(pending) < AT_ONCE:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.connect_ex((host, ports[begun % len(ports)]))
            pending[sock.fileno()] = sock
            poll.register(sock.fileno(), select.EPOLLOUT)
            begun += 1
        for number, events in poll.poll(deadline - time.monotonic()):
            sock = pending[number]
            if events & (select.EPOLLERR | select.EPOLLHUP):
                raise ConnectionError(
                    f"connection {len(held) + 1}: error {sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)}"
                )
            if events & select.EPOLLOUT:
                sock.send(REQUEST)
                poll.modify(number, select.EPOLLIN)
            elif sock.recv(4096):
                poll.unregister(number)
                held.append(pending.pop(number))
            else:
                raise ConnectionError(f"connection {len(held) + 1}: closed")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(held)} connections after {DEADLINE_S} s")
    poll.close()


def main(host: str, ports: list[int], first: int, every: int) -> None:
    """See the top."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[socket.socket] = []
    deadline = time.monotonic() + DEADLINE_S
    open_more(host, ports, first, held, deadline)
    print("warm", flush=True)
    sys.stdin.readline()
    open_more(host, ports, every - first, held, deadline)
    print("held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], [int(port) for port in sys.argv[2].split(",")], int(sys.argv[3]), int(sys.argv[4]))
