# SPDX-License-Identifier: Apache-2.0
"""The floor of bench/microvm: the same QEMU command line, kernel, initramfs and image, driven by nothing but this file.

The host's part of the agent's protocol (ateom/guest/src/lib.rs) is as little as a boot needs.
"""

import base64
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time

TAP = "sbvm0"
ADDRESS = ("169.254.17.2", 8080)
LIMIT = 120


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def first_byte(deadline=LIMIT):
    """Asks the workload until it answers; refused connections are asked again at once."""
    until = time.monotonic() + deadline
    while True:
        try:
            client = http.client.HTTPConnection(*ADDRESS, timeout=1)
            client.request("GET", "/")
            answer = client.getresponse()
            return json.loads(answer.read())
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.002)
        finally:
            client.close()


class Bare:
    """One machine with a tap in this namespace."""

    def __init__(self, argv, disk):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="sb-", dir=disk))
        self.live = self.dir / "live"
        self.live.mkdir()
        self.template = argv
        self.process = None
        self.made = False
        run("mount", "-t", "tmpfs", "-o", "mode=0711", "sb-memory", self.live)
        run("ip", "tuntap", "add", "dev", TAP, "mode", "tap")
        self.made = True
        run("ip", "link", "set", TAP, "address", "02:00:00:00:00:01")
        run("ip", "address", "add", "169.254.17.1/30", "dev", TAP)
        run("ip", "link", "set", TAP, "up")

    def argv(self, memory, share, incoming):
        out, words = [], iter(self.template)
        for word in words:
            if word == "-incoming":
                next(words)
                continue
            word = re.sub(r"(mem-path=)[^,]*(,share=)on", rf"\g<1>{memory}\g<2>{share}", word)
            word = re.sub(r"(file,id=console,path=).*", rf"\g<1>{self.live}/console", word)
            word = re.sub(r"tap,id=net,fd=\d+", f"tap,id=net,ifname={TAP},script=no,downscript=no", word)
            out.append(word)
        return out + (["-incoming", "defer"] if incoming else [])

    def start(self, memory, share="on", incoming=False):
        listeners = []
        for name in ("qmp.sock", "agent.sock"):
            path = self.dir / name
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(LIMIT)
            listeners.append(listener)
        with open(self.dir / "log", "wb") as log:
            self.process = subprocess.Popen(
                self.argv(memory, share, incoming), cwd=self.dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        (self.qmp, _), (self.agent, _) = (listener.accept() for listener in listeners)
        for listener in listeners:
            listener.close()
        for connection in (self.qmp, self.agent):
            connection.settimeout(LIMIT)
        self.lines = self.qmp.makefile("r")
        self.lines.readline()
        self.command("qmp_capabilities")
        capabilities = [{"capability": name, "state": True} for name in ("events", "x-ignore-shared")]
        self.command("migrate-set-capabilities", capabilities=capabilities)
        self.command("migrate-set-parameters", **{"max-bandwidth": 1 << 40})

    def command(self, name, fd=None, **arguments):
        line = json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
        if fd is None:
            self.qmp.sendall(line)
        else:
            socket.send_fds(self.qmp, [line], [fd])
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']}")
            if "return" in answer:
                return
            self.event = answer

    def migrated(self):
        event = self.event
        while event.get("event") != "MIGRATION" or event["data"]["status"] not in ("completed", "failed"):
            event = json.loads(self.lines.readline())
        self.event = {}
        if event["data"]["status"] == "failed":
            raise RuntimeError("the migration failed")

    event = {}

    def tell(self, message):
        payload = json.dumps(message).encode()
        self.agent.sendall(struct.pack("<BII", 0, 0, len(payload)) + payload)

    def hear(self):
        while True:
            kind, _, length = struct.unpack("<BII", self._exactly(9))
            payload = self._exactly(length)
            if kind == 0:
                return json.loads(payload)

    def _exactly(self, length):
        data = b""
        while len(data) < length:
            piece = self.agent.recv(length - len(data))
            if not piece:
                raise RuntimeError((self.dir / "log").read_text() + (self.live / "console").read_text())
            data += piece
        return data

    def boot(self, size, program):
        """Seconds from the process's start to the workload's first answer."""
        memory = self.live / "memory"
        memory.unlink(missing_ok=True)
        with open(memory, "wb") as file:
            file.truncate(size)
        before = time.monotonic()
        self.start(memory)
        self.hear()
        entropy = base64.b64encode(os.urandom(64)).decode()
        process = {
            "args": program["args"], "env": program["env"], "cwd": program["cwd"], "uid": 1000, "gid": 1000,
            "groups": [], "capabilities": [], "no_new_privileges": True,
        }  # fmt: skip
        self.tell({"Boot": {
            "renewal": {"time_ns": time.time_ns(), "entropy": entropy, "delivered": []},
            "hostname": "bare", "pids": 0,
            "networks": [{"address": ADDRESS[0], "prefix": 30, "gateway": "169.254.17.1"}],
            "images": ["image0"], "volumes": [], "etc": [],
            "containers": [{"name": "main", "image": 0, "process": process, "read_only_root": False, "mounts": []}],
        }})  # fmt: skip
        answer = self.hear()
        if answer != "Booted":
            raise RuntimeError(answer)
        first_byte()
        return time.monotonic() - before

    def stop(self, devices):
        """Seconds for which the processors stand still while the devices are saved; the memory is in its file."""
        with open(devices, "wb") as file:
            before = time.monotonic()
            self.command("stop")
            self.command("getfd", fd=file.fileno(), fdname="d")
            self.command("migrate", uri="fd:d")
            self.migrated()
            took = time.monotonic() - before
        return took

    def go_on(self):
        # A migration that completed leaves the machine stopped; QEMU finishes it a moment later.
        until = time.monotonic() + 10
        while True:
            try:
                return self.command("cont")
            except RuntimeError as error:
                if "finaliz" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.001)

    def restore(self, memory, devices):
        """Seconds from the process's start to the workload's first answer."""
        before = time.monotonic()
        self.start(memory, share="off", incoming=True)
        with open(devices, "rb") as file:
            self.command("getfd", fd=file.fileno(), fdname="d")
        self.command("migrate-incoming", uri="fd:d")
        self.migrated()
        self.command("cont")
        first_byte()
        return time.monotonic() - before

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
            for one in (self.lines, self.qmp, self.agent):
                one.close()

    def close(self):
        self.kill()
        if self.made:
            run("ip", "link", "delete", TAP)
        run("umount", self.live)
        shutil.rmtree(self.dir)
