#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""An offline model server with the OpenAI-compatible API, for machines without one.

    responder.py [--host H] [--port P] [--model NAME] [--api-key-file FILE]
                 [--delay-ms N] [--tls-cert PEM --tls-key PEM]

It serves POST /v1/chat/completions (also with "stream": true), GET /v1/models
and GET /healthz. There is no model behind it: a few rules answer from the
conversation that the request carries, and only from that, so an answer that
refers to an earlier turn proves that the caller still had it.

The first line on stdout is {"listening": "http://HOST:PORT/v1"}.
"""

import argparse
import json
import re
import signal
import socketserver
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import _exit

MAX_BODY_BYTES = 8 << 20

NAME = re.compile(r"\b(?:my name is|this is|i am|i'm)\s+([A-Z][\w-]*)", re.IGNORECASE)
ORDER = re.compile(
    r"\b(?:order|ticket|invoice)\s*(?:number|no\.?|#)?\s*(?:is\s*)?#?\s*([A-Z]*-?\d[\w-]*)", re.I
)
RECALL = re.compile(r"\b(?:ask|asked|say|said|tell|told|question)\b")
PRODUCT = re.compile(
    r"\bmy\s+(?!name\b|order\b|ticket\b|invoice\b)(\w+(?:\s\w+)?)\s+(?:is|has|does|keeps|won't|never)\b", re.I
)


def user_turns(messages):
    """What the user said, oldest first, as text."""
    turns = []
    for message in messages:
        if message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, list):
            content = " ".join(part.get("text", "") for part in content if isinstance(part, dict))
        turns.append(str(content or "").strip())
    return turns


def last_match(pattern, turns):
    """The newest thing a pattern finds in the turns: (turn number, text) or None."""
    for number in range(len(turns), 0, -1):
        if found := pattern.search(turns[number - 1]):
            return number, found[1]
    return None


def reply(messages):
    """The answer to the last user message, from the conversation alone."""
    turns = user_turns(messages)
    if not turns:
        return "Hello, this is the help desk. What can I do for you?"
    now, before = turns[-1], turns[:-1]
    lower = now.lower()
    if re.search(r"\b(first|earlier|before|at the start)\b", lower) and RECALL.search(lower):
        if not before:
            return "This is your first question; you asked nothing before it."
        return f'In turn 1 you said: "{before[0]}"'
    if re.search(r"\b(what|who|which|remember|recall|know)\b", lower):
        if re.search(r"\b(my name|who am i)\b", lower):
            if found := last_match(NAME, before):
                return f"Your name is {found[1]}; you told me in turn {found[0]}."
            return "You have not told me your name yet."
        if re.search(r"\b(order|ticket|invoice)\b", lower) and not ORDER.search(now):
            if found := last_match(ORDER, before):
                return f"It is {found[1]}; you gave it in turn {found[0]}."
            return "You have not given me a number yet."
    facts = []
    if found := NAME.search(now):
        facts.append(f"hello {found[1]}")
    if found := ORDER.search(now):
        facts.append(f"I noted number {found[1]}")
    if found := PRODUCT.search(now):
        facts.append(f"I am sorry about your {found[1]}")
    opening = ", ".join(facts) if facts else f'I noted "{now[:120]}"'
    opening = opening[0].upper() + opening[1:]
    if before:
        return f'{opening}. This is turn {len(turns)}; you began with "{before[0][:120]}".'
    return f"{opening}. This is turn 1; tell me more."


def completion(model, text, messages):
    """A chat.completion object as the API defines it."""
    words = sum(len(turn.split()) for turn in user_turns(messages))
    return {
        "id": f"chatcmpl-{time.time_ns():x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        ],
        "usage": {
            "prompt_tokens": words,
            "completion_tokens": len(text.split()),
            "total_tokens": words + len(text.split()),
        },
    }


def chunks(model, text):
    """The same answer as chat.completion.chunk events, a word at a time."""
    base = {
        "id": f"chatcmpl-{time.time_ns():x}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in re.findall(r"\S+\s*", text)]
    for delta in deltas:
        yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


class Server(ThreadingHTTPServer):
    """A threaded HTTP server that asks no DNS server when it binds."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, model="helpdesk-offline", api_key="", delay_ms=0):
        super().__init__(address, Handler)
        self.model = model
        self.api_key = api_key
        self.delay_ms = delay_ms

    def server_bind(self):
        # HTTPServer.server_bind looks its own name up, which hangs without DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        """A caller that went away is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The three routes."""

    protocol_version = "HTTP/1.1"
    server_version = "responder"
    sys_version = ""
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        """Serves the list of models and the health check."""
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._reply(200, {"ok": True})
        elif path == "/v1/models":
            if self._authorized():
                entry = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "substrate"}
                self._reply(200, {"object": "list", "data": [entry]})
        else:
            self._refuse(404, f"no route GET {path}", "not_found")

    def do_POST(self):
        """Serves a chat completion."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            self._refuse(413, f"the body is larger than {MAX_BODY_BYTES} bytes", "too_large")
            return
        data = self.rfile.read(length)
        path = self.path.partition("?")[0]
        if path != "/v1/chat/completions":
            self._refuse(404, f"no route POST {path}", "not_found")
            return
        if not self._authorized():
            return
        try:
            request = json.loads(data)
            messages = request["messages"]
            text = reply(messages)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._refuse(400, f"not a chat completion request: {error!r}", "invalid_request_error")
            return
        time.sleep(self.server.delay_ms / 1000)
        model = request.get("model") or self.server.model
        if request.get("stream"):
            self._stream(chunks(model, text))
        else:
            self._reply(200, completion(model, text, messages))

    def _authorized(self):
        if self.server.api_key and self.headers.get("Authorization") != f"Bearer {self.server.api_key}":
            self._refuse(401, "missing or wrong API key", "invalid_api_key")
            return False
        return True

    def _refuse(self, status, message, kind):
        self._reply(status, {"error": {"message": message, "type": kind}})

    def _reply(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, events):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in [json.dumps(e) for e in events] + ["[DONE]"]:
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format, *args):
        """One line a request on stderr, without asking who the peer is."""
        sys.stderr.write(f"responder: {self.client_address[0]} {format % args}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=11434, help="0 takes a free one")
    parser.add_argument("--model", default="helpdesk-offline")
    parser.add_argument("--api-key-file", help="ask callers for this key")
    parser.add_argument("--delay-ms", type=int, default=0, help="think for so long before an answer")
    parser.add_argument("--tls-cert", help="PEM file: serve HTTPS")
    parser.add_argument("--tls-key", help="PEM file of the certificate's key")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _exit(0))
    key = ""
    if options.api_key_file:
        with open(options.api_key_file, encoding="utf-8") as file:
            key = file.read().strip()
    server = Server((options.host, options.port), options.model, key, options.delay_ms)
    scheme = "http"
    if options.tls_cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.tls_cert, options.tls_key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    print(json.dumps({"listening": f"{scheme}://{options.host}:{server.server_port}/v1"}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
