# SPDX-License-Identifier: Apache-2.0
"""A help-desk agent that keeps everything it knows in its own memory.

    GET    /status                     who it is and what it holds
    GET    /healthz                    "ok", the readiness probe
    POST   /chat     {"message"}       asks the model, with the whole conversation
    GET    /history                    the conversation so far
    POST   /probe    {"url", …}        tries to reach a URL (see probe.py)
    GET    /slow?ms=N                  answers after N ms
    GET    /stream?seconds=N           one line per 100 ms, as chunks (also POST)
    POST   /allocate {"mb"}            holds that much more random memory
    POST   /touch    {"percent", "pattern"}   rewrites a share of it
    GET    /heap                       its size and SHA-256
    DELETE /heap                       lets go of it

What proves that a snapshot carried it over: `nonce` is drawn when the process
starts and `ticks` counts every 100 ms; neither is ever written down. A clone
must differ from its sibling, so the afterRestore hook (`after-restore`) asks,
through a Unix socket, for another nonce when substrate says it is a clone.

`history_turns` counts answered turns only: a turn enters the history in one
step, after the model's answer has arrived. A failed model call changes nothing
and is answered with 502 and the cause.

Environment: PORT, HELPDESK_MODEL, HELPDESK_BASE_URL (up to and including /v1),
HELPDESK_API_KEY_FILE (read at every call, so that a renewed secret is used),
HELPDESK_TIMEOUT_S, HELPDESK_SOCKET.
"""

import hashlib
import http.client
import json
import os
import random
import secrets
import signal
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import probe

TICK_SECONDS = 0.1
MAX_BODY_BYTES = 1 << 20
MAX_HEAP_MB = 16384
PAGE_BYTES = 4096
SYSTEM_PROMPT = "You are a friendly help desk. Answer briefly and use what the user told you before."


class ModelError(Exception):
    """The model server gave no usable answer; the text says why."""


class BadRequest(Exception):
    """The caller's request cannot be served as it is; the text says why."""


class Settings:
    """What the environment says; see the module's text."""

    def __init__(self, env):
        self.port = int(env.get("PORT", "8080"))
        self.model = env.get("HELPDESK_MODEL", "helpdesk-offline")
        self.base_url = env.get("HELPDESK_BASE_URL", "http://127.0.0.1:11434/v1").rstrip("/")
        self.api_key_file = env.get("HELPDESK_API_KEY_FILE", "")
        self.timeout_s = float(env.get("HELPDESK_TIMEOUT_S", "60"))
        self.socket = env.get("HELPDESK_SOCKET", "/tmp/helpdesk.sock")
        self.identity = env.get("HELPDESK_IDENTITY", "/run/ate")

    def api_key(self):
        """The key's present value, or an empty string where there is none."""
        try:
            with open(self.api_key_file, encoding="utf-8") as file:
                return file.read().strip()
        except OSError:
            return ""

    def name(self):
        """The actor's name as substrate tells it, or None outside of substrate."""
        try:
            with open(os.path.join(self.identity, "name"), encoding="utf-8") as file:
                return file.read().strip() or None
        except OSError:
            return None


def ask_model(settings, messages):
    """One chat completion. Answers the text or raises ModelError."""
    url = urllib.parse.urlsplit(f"{settings.base_url}/chat/completions")
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := settings.api_key():
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"model": settings.model, "messages": messages, "stream": False})
    target = url.path + (f"?{url.query}" if url.query else "")
    try:
        connection = kind(url.hostname, url.port, timeout=settings.timeout_s)
        try:
            connection.request("POST", target, body.encode(), headers)
            response = connection.getresponse()
            data = response.read(MAX_BODY_BYTES)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ModelError(f"{settings.base_url}: {type(error).__name__}: {error}") from error
    if response.status != 200:
        text = data[:300].decode("utf-8", "replace").strip()
        raise ModelError(f"{settings.base_url} answered {response.status}: {text}")
    try:
        answer = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{settings.base_url} sent no chat completion: {data[:100]!r}") from error
    if not isinstance(answer, str) or not answer.strip():
        raise ModelError(f"{settings.base_url} sent an empty answer")
    return answer


class Agent:
    """Everything that lives only in memory."""

    def __init__(self, settings, ask=ask_model):
        self.settings = settings
        self._ask = ask
        self._lock = threading.Lock()
        self._turns = []
        self._heap = []
        self._started = time.monotonic()
        self.nonce = secrets.token_hex(16)
        self.redraws = 0
        self.ticks = 0
        self.max_tick_gap_s = 0.0

    def tick_forever(self):
        """Counts, and keeps the longest time that passed between two ticks."""
        last = time.monotonic()
        while True:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            self.max_tick_gap_s = max(self.max_tick_gap_s, now - last)
            last = now
            self.ticks += 1

    def redraw(self):
        """Gives a clone a nonce of its own."""
        with self._lock:
            random.seed()
            self.nonce = secrets.token_hex(16)
            self.redraws += 1
            return self.nonce

    def status(self):
        """The facts behind GET /status."""
        with self._lock:
            return {
                "agent": "helpdesk",
                "name": self.settings.name(),
                "nonce": self.nonce,
                "redraws": self.redraws,
                "ticks": self.ticks,
                "max_tick_gap_ms": round(self.max_tick_gap_s * 1000),
                "history_turns": len(self._turns),
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started, 3),
                "heap_mb": len(self._heap),
                "model": self.settings.model,
                "base_url": self.settings.base_url,
            }

    def history(self):
        """The answered turns as [{"message", "answer"}]."""
        with self._lock:
            return [{"message": message, "answer": answer} for message, answer in self._turns]

    def chat(self, message):
        """Asks the model with the whole history; only an answer adds a turn."""
        if not isinstance(message, str) or not message.strip():
            raise BadRequest('"message" must be a text that is not empty')
        messages = [{"role": "system", "content": SYSTEM_PROMPT}]
        with self._lock:
            for asked, answered in self._turns:
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": message})
        answer = self._ask(self.settings, messages)
        with self._lock:
            self._turns.append((message, answer))
            return {"answer": answer, "history_turns": len(self._turns), "nonce": self.nonce}

    def allocate(self, megabytes):
        """Holds that many MiB more of random, and so incompressible, memory."""
        whole = isinstance(megabytes, int) and not isinstance(megabytes, bool)
        if not whole or megabytes < 0 or megabytes + len(self._heap) > MAX_HEAP_MB:
            raise BadRequest(f'"mb" must be a whole number, at most {MAX_HEAP_MB} in all')
        for _ in range(megabytes):
            block = bytearray(os.urandom(1 << 20))
            with self._lock:
                self._heap.append(block)
        return {"heap_mb": len(self._heap)}

    def touch(self, percent, pattern):
        """Rewrites a share of the held memory, page by page."""
        if not isinstance(percent, (int, float)) or not 0 <= percent <= 100:
            raise BadRequest('"percent" must be a number from 0 to 100')
        if pattern not in ("stretch", "random"):
            raise BadRequest('"pattern" must be "stretch" or "random"')
        per_block = (1 << 20) // PAGE_BYTES
        with self._lock:
            total = len(self._heap) * per_block
            count = int(total * percent / 100)
            if pattern == "random":
                pages = random.sample(range(total), count)
            else:
                first = random.randrange(total - count + 1)
                pages = range(first, first + count)
            for page in pages:
                block, slot = divmod(page, per_block)
                start = slot * PAGE_BYTES
                self._heap[block][start : start + PAGE_BYTES] = os.urandom(PAGE_BYTES)
        return {"touched_pages": count, "page_bytes": PAGE_BYTES}

    def heap(self):
        """The held memory's size and digest."""
        digest = hashlib.sha256()
        with self._lock:
            for block in self._heap:
                digest.update(block)
            return {"heap_mb": len(self._heap), "sha256": digest.hexdigest()}

    def free(self):
        """Lets go of the held memory."""
        with self._lock:
            self._heap.clear()
        return {"heap_mb": 0}


class Server(ThreadingHTTPServer):
    """A threaded HTTP server that asks no DNS server when it binds."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, agent):
        super().__init__(address, Handler)
        self.agent = agent

    def server_bind(self):
        # HTTPServer.server_bind looks its own name up, which hangs without DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        """A peer that went away, as all have after a restore, is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Maps the routes in the module's text to the agent."""

    protocol_version = "HTTP/1.1"
    server_version = "helpdesk"
    sys_version = ""
    # Headers and body in one segment instead of two.
    wbufsize = -1
    disable_nagle_algorithm = True

    ROUTES = {
        ("GET", "/status"): lambda self, query, body: self.server.agent.status(),
        ("GET", "/healthz"): lambda self, query, body: {"ok": True},
        ("GET", "/history"): lambda self, query, body: self.server.agent.history(),
        ("POST", "/chat"): lambda self, query, body: self.server.agent.chat(body.get("message")),
        ("POST", "/probe"): lambda self, query, body: probe.probe(body),
        ("POST", "/allocate"): lambda self, query, body: self.server.agent.allocate(body.get("mb")),
        ("POST", "/touch"): lambda self, query, body: self.server.agent.touch(
            body.get("percent"), body.get("pattern", "random")
        ),
        ("GET", "/heap"): lambda self, query, body: self.server.agent.heap(),
        ("DELETE", "/heap"): lambda self, query, body: self.server.agent.free(),
        ("GET", "/slow"): lambda self, query, body: self._slow(query),
        ("GET", "/stream"): lambda self, query, body: self._stream(query),
        ("POST", "/stream"): lambda self, query, body: self._stream(query),
    }

    def do_GET(self):
        """Serves a GET."""
        self._serve()

    def do_POST(self):
        """Serves a POST."""
        self._serve()

    def do_DELETE(self):
        """Serves a DELETE."""
        self._serve()

    def _serve(self):
        url = urllib.parse.urlsplit(self.path)
        route = self.ROUTES.get((self.command, url.path))
        try:
            body = self._body()
            if route is None:
                known = ", ".join(f"{method} {path}" for method, path in self.ROUTES)
                self._reply(404, {"error": f"no route {self.command} {url.path}; there are {known}"})
                return
            answer = route(self, dict(urllib.parse.parse_qsl(url.query)), body)
        except BadRequest as error:
            self._reply(400, {"error": str(error)})
        except ModelError as error:
            self._reply(502, {"error": "the model did not answer", "cause": str(error)})
        else:
            if answer is not None:
                self._reply(200, answer)

    def _body(self):
        try:
            length = int(self.headers.get("Content-Length") or 0)
        except ValueError as error:
            self.close_connection = True
            raise BadRequest("Content-Length is not a number") from error
        if not 0 <= length <= MAX_BODY_BYTES:
            self.close_connection = True
            raise BadRequest(f"the body is larger than {MAX_BODY_BYTES} bytes")
        if length == 0:
            return {}
        try:
            body = json.loads(self.rfile.read(length))
        except ValueError as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        return body

    def _reply(self, status, value):
        body = json.dumps(value).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @staticmethod
    def _number(query, key, default, most):
        try:
            value = float(query.get(key, default))
        except ValueError as error:
            raise BadRequest(f'"{key}" must be a number') from error
        if not 0 <= value <= most:
            raise BadRequest(f'"{key}" must be from 0 to {most}')
        return value

    def _slow(self, query):
        milliseconds = self._number(query, "ms", 1000, 600_000)
        before = self.server.agent.ticks
        time.sleep(milliseconds / 1000)
        agent = self.server.agent
        return {"slept_ms": milliseconds, "ticks": [before, agent.ticks], "nonce": agent.nonce}

    def _stream(self, query):
        seconds = self._number(query, "seconds", 10, 3600)
        agent = self.server.agent
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in range(round(seconds / TICK_SECONDS) + 1):
            data = json.dumps({"line": line, "ticks": agent.ticks, "nonce": agent.nonce}).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
            time.sleep(TICK_SECONDS)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format, *args):
        """One short line a request on stderr."""
        sys.stderr.write(f"{format % args}\n")


def serve_hook(agent, path):
    """Answers `redraw` on a Unix socket that only this container can reach."""
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(8)

    def answer():
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(1)
                try:
                    word = connection.recv(64).strip()
                    reply = agent.redraw() if word == b"redraw" else "unknown word; say redraw"
                    connection.sendall(reply.encode() + b"\n")
                except OSError as error:
                    print(f"helpdesk: hook: {error}", file=sys.stderr, flush=True)

    threading.Thread(target=answer, name="hook", daemon=True).start()
    return listener


def main():
    for number in (signal.SIGTERM, signal.SIGINT):
        # At once: nothing is worth writing down, and streams may be running.
        signal.signal(number, lambda *_: os._exit(0))
    settings = Settings(os.environ)
    agent = Agent(settings)
    threading.Thread(target=agent.tick_forever, name="ticks", daemon=True).start()
    serve_hook(agent, settings.socket)
    server = Server(("0.0.0.0", settings.port), agent)
    print(f"helpdesk: listening on port {settings.port}, nonce {agent.nonce}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
