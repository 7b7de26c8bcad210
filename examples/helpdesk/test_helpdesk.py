# SPDX-License-Identifier: Apache-2.0
"""Tests of the agent, its probe and the responder; they use only loopback.

python3 -m unittest discover examples/helpdesk
"""

import http.client
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import helpdesk  # noqa: E402
import probe  # noqa: E402
import responder  # noqa: E402


def call(port, method, path, body=None):
    """One request: (status, JSON value)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def serve(test, server):
    """Runs a server for the length of a test; answers its port."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    test.addCleanup(server.server_close)
    test.addCleanup(server.shutdown)
    return server.server_address[1]


def a_listener(test, serve_one):
    """A TCP listener that hands each connection to serve_one; answers its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    test.addCleanup(listener.close)

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                serve_one(connection)

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def a_closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class AgentTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.dir = pathlib.Path(directory.name)
        self.responder = responder.Server(("127.0.0.1", 0), api_key="")
        responder.Handler.log_message = lambda *_: None
        helpdesk.Handler.log_message = lambda *_: None
        port = serve(self, self.responder)
        self.settings = helpdesk.Settings(
            {
                "HELPDESK_BASE_URL": f"http://127.0.0.1:{port}/v1",
                "HELPDESK_API_KEY_FILE": str(self.dir / "key"),
                "HELPDESK_SOCKET": str(self.dir / "hook.sock"),
                "HELPDESK_IDENTITY": str(self.dir),
                "HELPDESK_TIMEOUT_S": "5",
            }
        )
        self.agent = helpdesk.Agent(self.settings)
        self.port = serve(self, helpdesk.Server(("127.0.0.1", 0), self.agent))

    def test_status_names_what_is_held(self):
        status, facts = call(self.port, "GET", "/status")
        self.assertEqual(status, 200)
        self.assertEqual(facts["nonce"], self.agent.nonce)
        self.assertEqual(facts["history_turns"], 0)
        self.assertIsNone(facts["name"])
        self.assertEqual(facts["base_url"], self.settings.base_url)
        (self.dir / "name").write_text("alice\n")
        self.assertEqual(call(self.port, "GET", "/status")[1]["name"], "alice")

    def test_two_agents_draw_two_nonces(self):
        self.assertNotEqual(helpdesk.Agent(self.settings).nonce, self.agent.nonce)

    def test_answer_refers_to_the_first_turn(self):
        first = "My order number is A-1234"
        status, answer = call(self.port, "POST", "/chat", {"message": first})
        self.assertEqual((status, answer["history_turns"]), (200, 1))
        status, answer = call(self.port, "POST", "/chat", {"message": "What is my order number?"})
        self.assertEqual((status, answer["history_turns"]), (200, 2))
        self.assertIn("A-1234", answer["answer"])
        status, answer = call(self.port, "POST", "/chat", {"message": "What did I ask first?"})
        self.assertIn(first, answer["answer"])
        self.assertEqual(len(call(self.port, "GET", "/history")[1]), 3)

    def test_a_failed_model_call_adds_no_turn(self):
        self.settings.base_url = f"http://127.0.0.1:{a_closed_port()}/v1"
        status, answer = call(self.port, "POST", "/chat", {"message": "hello"})
        self.assertEqual(status, 502)
        self.assertIn("refused", answer["cause"])
        self.assertEqual(call(self.port, "GET", "/status")[1]["history_turns"], 0)

    def test_a_model_that_talks_nonsense_adds_no_turn(self):
        self.settings.base_url = self.settings.base_url.replace("/v1", "/v2")
        status, answer = call(self.port, "POST", "/chat", {"message": "hello"})
        self.assertEqual(status, 502)
        self.assertIn("404", answer["cause"])
        self.assertEqual(self.agent.status()["history_turns"], 0)

    def test_the_key_is_read_at_every_call(self):
        self.responder.api_key = "s3cret"
        status, answer = call(self.port, "POST", "/chat", {"message": "hello"})
        self.assertEqual(status, 502)
        self.assertIn("401", answer["cause"])
        (self.dir / "key").write_text("s3cret\n")
        self.assertEqual(call(self.port, "POST", "/chat", {"message": "hello"})[0], 200)

    def test_status_answers_while_the_model_thinks(self):
        self.responder.delay_ms = 1500
        results = []
        thread = threading.Thread(
            target=lambda: results.append(call(self.port, "POST", "/chat", {"message": "hello"}))
        )
        thread.start()
        before = time.monotonic()
        self.assertEqual(call(self.port, "GET", "/status")[1]["history_turns"], 0)
        self.assertLess(time.monotonic() - before, 1)
        thread.join()
        self.assertEqual(results[0][0], 200)

    def test_bad_requests_are_named(self):
        for method, path, body, word in [
            ("POST", "/chat", {"message": " "}, "message"),
            ("POST", "/chat", {}, "message"),
            ("POST", "/allocate", {"mb": -1}, "mb"),
            ("POST", "/touch", {"percent": 1, "pattern": "x"}, "pattern"),
            ("GET", "/slow?ms=x", None, "ms"),
        ]:
            with self.subTest(path=path, body=body):
                status, answer = call(self.port, method, path, body)
                self.assertEqual(status, 400)
                self.assertIn(word, answer["error"])
        self.assertEqual(call(self.port, "GET", "/nowhere")[0], 404)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        self.addCleanup(connection.close)
        connection.request("POST", "/chat", "{not json")
        self.assertEqual(connection.getresponse().status, 400)

    def test_heap_is_held_touched_and_let_go(self):
        self.assertEqual(call(self.port, "POST", "/allocate", {"mb": 2})[1]["heap_mb"], 2)
        before = call(self.port, "GET", "/heap")[1]
        self.assertEqual(before, call(self.port, "GET", "/heap")[1])
        for pattern in ("stretch", "random"):
            touched = call(self.port, "POST", "/touch", {"percent": 10, "pattern": pattern})[1]
            self.assertEqual(touched["touched_pages"], 51)
        self.assertNotEqual(before["sha256"], call(self.port, "GET", "/heap")[1]["sha256"])
        self.assertEqual(call(self.port, "DELETE", "/heap")[1]["heap_mb"], 0)

    def test_stream_comes_in_chunks_over_time(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        self.addCleanup(connection.close)
        connection.request("GET", "/stream?seconds=0.3")
        response = connection.getresponse()
        started = time.monotonic()
        lines = [json.loads(line) for line in response]
        self.assertGreaterEqual(time.monotonic() - started, 0.25)
        self.assertEqual([line["line"] for line in lines], [0, 1, 2, 3])

    def test_hook_redraws_only_a_clone(self):
        helpdesk.serve_hook(self.agent, self.settings.socket)
        env = {
            "PATH": os.environ["PATH"],
            "HELPDESK_SOCKET": self.settings.socket,
            "HELPDESK_IDENTITY": str(self.dir),
        }
        hook = [str(HERE / "after-restore")]
        before = self.agent.nonce
        subprocess.run(hook, env=env, check=True)
        self.assertEqual(self.agent.nonce, before)
        (self.dir / "clone").write_text("0\n")
        subprocess.run(hook, env=env, check=True)
        self.assertEqual(self.agent.nonce, before)
        (self.dir / "clone").write_text("1")
        output = subprocess.run(hook, env=env, check=True, capture_output=True, text=True).stdout
        self.assertNotEqual(self.agent.nonce, before)
        self.assertIn(self.agent.nonce, output)
        self.assertEqual(self.agent.status()["redraws"], 1)


class ProcessTest(unittest.TestCase):
    def test_ticks_and_a_quick_end_on_sigterm(self):
        with tempfile.TemporaryDirectory() as directory:
            port = a_closed_port()
            env = {**os.environ, "PORT": str(port), "HELPDESK_SOCKET": f"{directory}/s"}
            process = subprocess.Popen(
                [sys.executable, str(HERE / "helpdesk.py")],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            with process:
                process.stdout.readline()
                first = call(port, "GET", "/slow?ms=350")[1]["ticks"]
                self.assertGreaterEqual(first[1] - first[0], 2)
                # An open stream does not hold the end up.
                stream = socket.create_connection(("127.0.0.1", port))
                stream.sendall(b"GET /stream?seconds=60 HTTP/1.1\r\nHost: x\r\n\r\n")
                stream.recv(100)
                before = time.monotonic()
                process.terminate()
                self.assertEqual(process.wait(5), 0)
                self.assertLess(time.monotonic() - before, 1)
                stream.close()


class ProbeTest(unittest.TestCase):
    def try_url(self, url, **options):
        result = probe.probe({"url": url, "timeout_ms": 2000, **options})
        self.assertEqual(result["url"], url)
        return result

    def test_http_statuses(self):
        seen = []

        def answer(connection):
            seen.append(connection.recv(4096).decode())
            status = "403 Forbidden" if "/denied" in seen[-1] else "200 OK"
            connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nhi".encode())

        port = a_listener(self, answer)
        good = self.try_url(f"http://127.0.0.1:{port}/a?b=1&host=other.example&connect=127.0.0.1")
        self.assertEqual((good["ok"], good["kind"], good["status"]), (True, "http", 200))
        self.assertIn("Host: other.example\r\n", seen[0])
        self.assertTrue(seen[0].startswith("GET /a?b=1 HTTP"))
        bad = self.try_url(f"http://127.0.0.1:{port}/denied", host="third.example")
        self.assertEqual((bad["ok"], bad["kind"], bad["status"]), (False, "http", 403))
        self.assertIn("Host: third.example\r\n", seen[1])

    def test_connect_to_another_address_under_the_url_s_name(self):
        seen = []

        def answer(connection):
            seen.append(connection.recv(4096).decode())
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

        port = a_listener(self, answer)
        result = self.try_url(f"http://allowed.invalid:{port}/", connect="127.0.0.1")
        self.assertTrue(result["ok"], result)
        self.assertIn(f"Host: allowed.invalid:{port}\r\n", seen[0])

    def test_sni_is_what_was_asked_for(self):
        seen = []
        port = a_listener(self, lambda connection: seen.append(connection.recv(4096)))
        result = self.try_url(f"https://127.0.0.1:{port}/?sni=neighbour.example")
        self.assertEqual((result["ok"], result["kind"]), (False, "tls"))
        self.assertIn(b"neighbour.example", seen[0])

    def test_refused_closed_and_silent(self):
        self.assertEqual(self.try_url(f"http://127.0.0.1:{a_closed_port()}/")["kind"], "connect")
        self.assertIn("ECONNREFUSED", self.try_url(f"tcp://127.0.0.1:{a_closed_port()}")["detail"])
        closing = a_listener(self, lambda connection: None)
        self.assertEqual(self.try_url(f"tcp://127.0.0.1:{closing}")["kind"], "closed")
        self.assertEqual(self.try_url(f"http://127.0.0.1:{closing}/")["kind"], "closed")
        silent = a_listener(self, lambda connection: connection.recv(1) and time.sleep(3))
        self.assertTrue(self.try_url(f"tcp://127.0.0.1:{silent}")["ok"])
        result = self.try_url(f"http://127.0.0.1:{silent}/", timeout_ms=200)
        self.assertEqual(result["kind"], "timeout")
        self.assertLess(result["ms"], 1500)

    def test_ipv6(self):
        if not socket.has_ipv6:
            self.skipTest("no IPv6 here")
        result = self.try_url("tcp://[::1]:1")
        self.assertEqual(result["kind"], "connect")

    def test_a_name_that_is_none(self):
        self.assertEqual(self.try_url("http://nowhere.invalid/")["kind"], "dns")

    def test_udp_dns(self):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(server.close)
        server.bind(("127.0.0.1", 0))

        def answer():
            for code, answers in ((0, 1), (5, 0)):
                query, peer = server.recvfrom(512)
                self.assertIn(b"\x07example\x03com\x00", query)
                server.sendto(query[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, answers, 0, 0), peer)

        threading.Thread(target=answer, daemon=True).start()
        url = f"udp-dns://127.0.0.1:{server.getsockname()[1]}/example.com"
        good = self.try_url(url)
        self.assertEqual((good["ok"], good["kind"], good["status"]), (True, "dns", 0))
        bad = self.try_url(url)
        self.assertEqual((bad["ok"], bad["detail"]), (False, "REFUSED, 0 answers"))
        closed = self.try_url(f"udp-dns://127.0.0.1:{a_closed_port()}/example.com")
        self.assertEqual(closed["kind"], "connect")

    def test_what_is_not_a_url(self):
        for url in ("ftp://x/", "tcp://127.0.0.1", "http://", "http://x:port/", None):
            with self.subTest(url=url):
                self.assertEqual(self.try_url(url)["kind"], "url")
        self.assertEqual(self.try_url("http://x/", timeout_ms="soon")["kind"], "url")


class ResponderTest(unittest.TestCase):
    def setUp(self):
        responder.Handler.log_message = lambda *_: None
        self.server = responder.Server(("127.0.0.1", 0))
        self.port = serve(self, self.server)

    def ask(self, *turns, **extra):
        messages = [{"role": "user", "content": turn} for turn in turns]
        return call(self.port, "POST", "/v1/chat/completions", {"messages": messages, **extra})

    def text(self, *turns):
        status, body = self.ask(*turns)
        self.assertEqual(status, 200)
        return body["choices"][0]["message"]["content"]

    def test_rules_use_the_history(self):
        opening = "Hi, my name is Ada, my printer is on fire"
        self.assertIn("Ada", self.text(opening, "What is my name?"))
        self.assertIn("turn 1", self.text(opening, "What is my name?"))
        self.assertIn("not told", self.text("What is my name?"))
        self.assertIn(opening, self.text(opening, "and?", "What did I ask first?"))
        self.assertIn("first question", self.text("What did I ask first?"))
        self.assertIn("4711", self.text("order number is 4711", "Which order was that?"))
        self.assertIn("sorry about your printer", self.text(opening))
        self.assertIn("turn 2", self.text(opening, "It still burns"))

    def test_models_and_errors(self):
        status, models = call(self.port, "GET", "/v1/models")
        self.assertEqual((status, models["data"][0]["id"]), (200, "helpdesk-offline"))
        self.assertEqual(call(self.port, "POST", "/v1/chat/completions", {})[0], 400)
        self.assertEqual(call(self.port, "POST", "/v1/completions", {})[0], 404)
        self.server.api_key = "k"
        self.assertEqual(self.ask("hello")[0], 401)

    def test_stream_ends_with_done(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        self.addCleanup(connection.close)
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        events = [line[6:] for line in connection.getresponse().read().decode().split("\n\n") if line]
        self.assertEqual(events[-1], "[DONE]")
        text = "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1])
        self.assertIn("This is turn 1", text)


if __name__ == "__main__":
    unittest.main()
