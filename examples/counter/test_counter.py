# SPDX-License-Identifier: Apache-2.0
"""Tests of the counter; they use only loopback.

python3 -m unittest discover examples/counter
"""

import http.client
import pathlib
import sys
import threading
import unittest
from json import loads

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import counter  # noqa: E402


class CounterTest(unittest.TestCase):
    def setUp(self):
        self.server = counter.make_server(0, "127.0.0.1")
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=5)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def test_counts_and_keeps_its_nonce(self):
        states = [loads(self.call(*how)[1]) for how in (("GET", "/"), ("POST", "/", "x"), ("GET", "/"))]
        self.assertEqual([state["count"] for state in states], [1, 2, 3])
        self.assertEqual({state["nonce"] for state in states}, {self.server.counter.nonce})

    def test_peek_does_not_count(self):
        self.call("GET", "/")
        self.assertEqual(loads(self.call("GET", "/peek")[1])["count"], 1)
        self.assertEqual(loads(self.call("GET", "/peek")[1])["count"], 1)

    def test_counts_every_one_of_many_at_once(self):
        threads = [threading.Thread(target=self.call, args=("GET", "/")) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(loads(self.call("GET", "/peek")[1])["count"], 20)

    def test_watch_streams_the_count_until_the_client_goes(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=5)
        self.addCleanup(connection.close)
        connection.request("GET", "/watch")
        response = connection.getresponse()
        self.assertEqual(response.getheader("content-type"), "text/event-stream")
        self.assertIn(b'"count": 0', response.readline())
        self.call("GET", "/")
        for _ in range(40):
            if b'"count": 1' in response.readline():
                return
        self.fail("the stream never showed the new count")

    def test_health_and_unknown_paths(self):
        self.assertEqual(self.call("GET", "/healthz"), (200, b"ok\n"))
        self.assertEqual(self.call("GET", "/other")[0], 404)

    def test_another_boot_draws_another_nonce(self):
        self.assertNotEqual(counter.Counter().nonce, counter.Counter().nonce)


if __name__ == "__main__":
    unittest.main()
