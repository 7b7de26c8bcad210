# SPDX-License-Identifier: Apache-2.0
"""The smallest actor: a number that lives only in this process's memory.

    GET /  or  POST /    counts up: {"count": 4, "nonce": "9f0c…"}
    GET /peek            the same without counting
    GET /watch           the same as server-sent events, ten a second
    GET /healthz         "ok", the readiness probe

The nonce is drawn once when the process starts. A count that goes on under the
same nonce was carried over by a snapshot; one under a new nonce was a reboot.
"""

import json
import os
import secrets
import signal
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Counter:
    """The state: a count and the nonce of this boot."""

    def __init__(self):
        self._lock = threading.Lock()
        self._count = 0
        self.nonce = secrets.token_hex(16)

    def add(self, step):
        """Adds step and answers the new state."""
        with self._lock:
            self._count += step
            return {"count": self._count, "nonce": self.nonce}


class Server(ThreadingHTTPServer):
    """A threaded HTTP server that asks no DNS server when it binds."""

    daemon_threads = True
    request_queue_size = 128

    def server_bind(self):
        # HTTPServer.server_bind looks its own name up, which hangs without DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]


class Handler(BaseHTTPRequestHandler):
    """Answers the routes above."""

    protocol_version = "HTTP/1.1"
    server_version = "counter"
    sys_version = ""
    # Headers and body in one segment instead of two.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        """Serves a GET."""
        self._serve()

    def do_POST(self):
        """Serves a POST; its body, if any, is read and ignored."""
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(min(length, 1 << 20))
        self._serve()

    def _serve(self):
        path = self.path.partition("?")[0]
        if path == "/":
            self._reply(200, self.server.counter.add(1))
        elif path == "/peek":
            self._reply(200, self.server.counter.add(0))
        elif path == "/watch":
            self._watch()
        elif path == "/healthz":
            self._reply(200, "ok")
        else:
            self._reply(404, {"error": f"no such path: {path}; try /, /peek, /watch or /healthz"})

    def _watch(self):
        """Streams until the client goes."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while True:
                self.wfile.write(f"data: {json.dumps(self.server.counter.add(0))}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass  # The client has gone.

    def _reply(self, status, value):
        text = value if isinstance(value, str) else json.dumps(value)
        body = text.encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Says nothing: one line a request would be most of a snapshot's log."""


def make_server(port, host="0.0.0.0"):
    """A bound, listening server with a fresh counter."""
    server = Server((host, port), Handler)
    server.counter = Counter()
    return server


def main():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    server = make_server(int(os.environ.get("PORT", "8080")))
    print(f"counter: listening on port {server.server_port}, nonce {server.counter.nonce}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
