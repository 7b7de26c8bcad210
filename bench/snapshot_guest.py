# SPDX-License-Identifier: Apache-2.0
"""The program that bench/snapshot runs inside the sandbox: a heap of a given size, and ways to change a part of it."""

import json
import random
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

PAGE = 4096
PAGES = int(sys.argv[1]) * 256
draw = random.Random(7)
# Half of each page is noise, half is not: about what heaps of scripts compress to.
heap = bytearray(PAGES * PAGE)
for page in range(PAGES):
    heap[page * PAGE : page * PAGE + PAGE // 2] = draw.randbytes(PAGE // 2)
    heap[page * PAGE + PAGE // 2 : (page + 1) * PAGE] = b"%08d " % page * (PAGE // 18) + bytes(PAGE // 2 % 9)


def touch(pages):
    for page in pages:
        heap[page * PAGE : page * PAGE + 8] = draw.randbytes(8)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/stretch":
            start = draw.randrange(PAGES - PAGES // 100)
            touch(range(start, start + PAGES // 100))
        elif self.path == "/random":
            touch(draw.sample(range(PAGES), PAGES // 100))
        body = json.dumps({"pages": PAGES}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


HTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
