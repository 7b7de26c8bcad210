# SPDX-License-Identifier: Apache-2.0
"""The program that bench/runsc-facts runs inside the sandbox.

HTTP on 8080, a line echo for long-lived inbound connections on 9000. Everything
that an experiment wants to know is a GET that answers JSON.
"""

import ctypes
import json
import os
import queue
import secrets
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NONCE = secrets.token_hex(8)
PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
state = {"count": 0, "ticks": 0, "max_gap_ms": 0}
heap = []
dials = []
opened = {}


def tick():
    last = time.monotonic()
    while True:
        time.sleep(0.02)
        now = time.monotonic()
        state["max_gap_ms"] = max(state["max_gap_ms"], round((now - last) * 1000))
        state["ticks"] += 1
        last = now


def tried_or_why(work):
    try:
        return work()
    except OSError as error:
        return f"refused: {error.strerror or error}"


def peer_credentials():
    """Whom SO_PEERCRED names for a child of uid 10001 that connects: the sidecar's control channel rests on it."""
    path = f"/tmp/peer-{secrets.token_hex(4)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()
        dial = f"import os, socket; os.setuid(10001); s = socket.socket(1); s.connect({path!r}); s.recv(1)"
        with subprocess.Popen([sys.executable, "-S", "-c", dial]) as child:
            listener.settimeout(10)
            connection, _ = listener.accept()
            with connection:
                pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return {"pid is the child's": pid == child.pid, "uid": uid}


def netlink(family, message):
    """Sends one netlink request; 0 or why not."""
    with socket.socket(16, socket.SOCK_RAW, family) as channel:
        channel.settimeout(5)
        channel.send(message)
        answer = channel.recv(4096)
        kind, code = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
        return f"refused: {os.strerror(-code)}" if kind == 2 and code else "done"


def new_table():
    """nft add table inet t: a batch of NFNETLINK, as the supervisor's fence of the sidecar begins."""

    def part(kind, flags, family, resource, data=b""):
        return struct.pack("=IHHII BBH", 20 + len(data), kind, flags, 1, 0, family, 0, socket.htons(resource)) + data

    name = struct.pack("=HH", 6, 1) + b"t\0\0\0"
    return netlink(12, part(16, 1, 0, 10) + part(10 << 8, 0x405, 1, 0, name) + part(17, 1, 0, 10))


def new_veth():
    """ip link add i0 type veth: the full mode's way out of its inner namespace."""

    def attribute(kind, data):
        return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)

    info = attribute(18, attribute(1, b"veth"))
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(3, b"i0\0") + info
    return netlink(0, struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)


class Inner(threading.Thread):
    """A thread in a network namespace of its own."""

    def __init__(self):
        super().__init__(daemon=True)
        self.asked, self.answers = queue.Queue(), queue.Queue()
        self.start()

    def run(self):
        libc = ctypes.CDLL(None, use_errno=True)
        made = "done" if libc.unshare(0x40000000) == 0 else f"refused: {os.strerror(ctypes.get_errno())}"
        veth = tried_or_why(new_veth) if made == "done" else None
        while self.asked.get():
            names = tried_or_why(lambda: sorted(name for _, name in socket.if_nameindex()))
            self.answers.put({"namespace": made, "veth": veth, "devices": names})

    def look(self):
        self.asked.put(True)
        return self.answers.get(timeout=10)


inner_namespace = []


def landlock():
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, 0, 1)
    return version if version >= 0 else f"refused: {os.strerror(ctypes.get_errno())}"


def direct(host, port):
    """Whether a process of uid 10001 gets a connection out past whatever listens on loopback."""
    dial = f"import os, socket; os.setuid(10001); socket.create_connection(({host!r}, {port}), 3)"
    return subprocess.run([sys.executable, "-S", "-c", dial], check=False, capture_output=True).returncode == 0


def tried(host, port, inner):
    if inner and not inner_namespace:
        inner_namespace.append(Inner())
    return {
        "SO_PEERCRED": tried_or_why(peer_credentials),
        "nft table": tried_or_why(new_table),
        "landlock": landlock(),
        "pids.max": [path for path in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max") if os.path.exists(path)],
        "direct connection of uid 10001": direct(host, port),
        **({"inner": inner_namespace[0].look()} if inner else {}),
    }


class Dial:
    """An outbound connection on which pings go out and pongs must come back."""

    def __init__(self, host, port):
        self.sent = self.received = 0
        self.error = None
        self.socket = socket.create_connection((host, port), timeout=3)
        self.socket.settimeout(5)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        try:
            while True:
                self.socket.sendall(b"%d\n" % self.sent)
                self.sent += 1
                if not self.socket.recv(64):
                    raise ConnectionError("closed by the peer")
                self.received += 1
                time.sleep(0.02)
        except OSError as error:
            self.error = repr(error)

    def report(self):
        return {"sent": self.sent, "received": self.received, "error": self.error}


class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            for line in self.rfile:
                self.wfile.write(line)
        except OSError as error:
            echo_errors.append(repr(error))


echo_errors = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        try:
            answer = getattr(self, "on_" + url.path.strip("/"))(**query)
        except Exception as error:  # the experiment wants to see it
            answer = {"error": repr(error)}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def on_state(self):
        return {
            "nonce": NONCE,
            **state,
            "pid": os.getpid(),
            "uid": os.getuid(),
            "hostname": socket.gethostname(),
            "env": dict(os.environ),
            "cwd": os.getcwd(),
            "echo_errors": echo_errors,
            "dials": [dial.report() for dial in dials],
            "monotonic": time.monotonic(),
            "wall": time.time(),
        }

    def on_supervisor(self, host, port, inner):
        return tried(host, int(port), inner == "1")

    def on_count(self):
        state["count"] += 1
        return {"count": state["count"], "nonce": NONCE}

    def on_alloc(self, mb, kind="random"):
        for _ in range(int(mb)):
            block = bytearray(1 << 20)
            if kind == "random":
                block[:] = os.urandom(1 << 20)
            elif kind == "zero":
                for page in range(0, 1 << 20, 4096):
                    block[page] = 1
                    block[page] = 0
            heap.append(block)
        return {"heap_mb": len(heap)}

    def on_slow(self, ms):
        time.sleep(int(ms) / 1000)
        return {"slept": int(ms), "nonce": NONCE}

    def on_dial(self, host, port):
        dials.append(Dial(host, int(port)))
        return {"dials": len(dials)}

    def on_open(self, path):
        opened[path] = open(path, encoding="utf-8")
        return opened[path].read()

    def on_reread(self, path):
        opened[path].seek(0)
        return opened[path].read()

    def on_read(self, path):
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(65536)

    def on_write(self, path, text):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return len(text)

    def on_unlink(self, path):
        os.unlink(path)
        return True

    def on_exists(self, path):
        return os.path.exists(path)

    def on_urandom(self):
        return os.urandom(16).hex()

    def on_ps(self):
        return subprocess.run(["/bin/ls", "/proc"], capture_output=True, text=True).stdout.split()

    def on_exit(self, code):
        os._exit(int(code))

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        pass


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


if __name__ == "__main__":
    threading.Thread(target=tick, daemon=True).start()
    threading.Thread(target=EchoServer(("0.0.0.0", PORT + 920), Echo).serve_forever, daemon=True).start()
    Server(("0.0.0.0", PORT), Handler).serve_forever()
