"""A real HTTP server, v4 and v6: GET /N answers N bytes, POST says how many came. Prints "ready" when it listens."""

from __future__ import annotations

import http.server
import socket


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802
        self.answer(b"x" * int(self.path.strip("/") or 5))

    def do_POST(self) -> None:  # noqa: N802
        self.answer(str(len(self.rfile.read(int(self.headers["Content-Length"])))).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


server = Server(("::", 8000), Handler)
print("ready", flush=True)
server.serve_forever()
