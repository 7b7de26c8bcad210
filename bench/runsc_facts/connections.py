# SPDX-License-Identifier: Apache-2.0
"""What becomes of connections across a checkpoint, in the running copy and in the restored one."""

import contextlib
import select
import threading
import time

from .harness import Net, Sandbox, ms


class Inbound:
    """A long-lived connection into the sandbox with a ping every few ms."""

    def __init__(self, net, port=9000):
        self.socket = net.connect(port)
        self.sent = self.received = 0
        self.max_gap_ms = 0.0
        self.error = None
        self.stop = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        last = time.monotonic()
        try:
            while not self.stop:
                self.socket.sendall(b"ping\n")
                self.sent += 1
                if not self.socket.recv(64):
                    raise ConnectionError("closed by the sandbox")
                self.received += 1
                now = time.monotonic()
                self.max_gap_ms = max(self.max_gap_ms, ms(now - last))
                last = now
                time.sleep(0.005)
        except OSError as error:
            self.error = repr(error)

    def report(self):
        self.stop = True
        self.thread.join(6)
        return {
            "alive": self.error is None,
            "error": self.error,
            "round_trips": self.received,
            "max_gap_ms": self.max_gap_ms,
        }


class InFlight:
    """A request whose answer is due only after the checkpoint."""

    def __init__(self, net, milliseconds):
        self.result = {}

        def run():
            before = time.monotonic()
            try:
                answer = net.get(f"/slow?ms={milliseconds}", timeout=15)
                self.result = {"ok": True, "nonce": answer["nonce"]}
            except OSError as error:
                self.result = {"ok": False, "error": repr(error)}
            self.result["ms"] = ms(time.monotonic() - before)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def report(self):
        self.thread.join(20)
        return self.result


def connections_leave_running(lab):
    """(a) Does a running copy keep its connections through checkpoint --leave-running?"""
    out = {}
    for label, flags in (
        ("default flags", ()),
        ("--allow-live-tcp-migration=false", ("--allow-live-tcp-migration=false",)),
        ("--allow-connected-on-save", ("--allow-connected-on-save",)),
    ):
        mark = lab.mark()
        net = Net(lab)
        box = Sandbox(lab, net, flags=flags).boot()
        port, seen = net.echo_server()
        net.get(f"/dial?host=169.254.17.1&port={port}")
        inbound = Inbound(net)
        rounds, errors = [], []
        flying = []
        for _ in range(5):
            flying.append(InFlight(net, 400))
            time.sleep(0.15)
            try:
                box.checkpoint(lab.image(), "--leave-running")
                rounds.append(box.times["checkpoint"])
            except Exception as error:  # what it says is the finding
                errors.append(str(error)[-300:])
                break
            time.sleep(0.1)
        state = net.get("/state")
        out[label] = {
            "checkpoints_ms": rounds,
            "errors": errors,
            "in_flight": [f.report() for f in flying],
            "inbound": inbound.report(),
            "outbound": {**state["dials"][0], "resets_at_the_peer": seen["resets"], "accepted": seen["accepted"]},
            "guest_max_gap_ms": state["max_gap_ms"],
            "keeps_serving": net.get("/count")["count"] == 1,
        }
        lab.undo(mark)
    return out


def connections_restored(lab):
    """(f) What the restored copy finds of its connections, on the same worker and on another."""
    out = {}
    for flag in ("true", "false"):
        for mode in ("stop", "leave-running"):
            for where in ("same worker", "other worker"):
                mark = lab.mark()
                net = Net(lab)
                flags = (f"--allow-live-tcp-migration={flag}",)
                box = Sandbox(lab, net, flags=flags).boot()
                port, seen = net.echo_server()
                net.get(f"/dial?host=169.254.17.1&port={port}")
                inbound = Inbound(net)
                time.sleep(0.1)
                nonce = net.get("/count")["nonce"]
                image = lab.image()
                box.checkpoint(image, *(["--leave-running"] if mode == "leave-running" else []))
                box.destroy()
                if where == "same worker":
                    net.rebuild()
                else:
                    net = Net(lab)
                again = Sandbox(lab, net, flags=flags)
                answer = again.restore(image)
                # Time for the guest's threads to use their old connections.
                time.sleep(1.0)
                state = net.get("/state")
                out[f"live-tcp-migration={flag}, {mode}, {where}"] = {
                    "same_nonce": answer["nonce"] == nonce,
                    "listens_again": net.get("/count")["count"] == 2,
                    "echo_port_listens": Inbound(net).report()["alive"],
                    "outbound_in_the_guest": state["dials"][0],
                    "inbound_in_the_guest": state["echo_errors"],
                    "inbound_at_the_client": inbound.report(),
                    "restore_ms": again.times["restore"],
                }
                lab.undo(mark)
    return out


def connections_many(lab):
    """Does a listener survive checkpoints under connection load (gVisor issue 13554)?"""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    stop = threading.Event()
    answered, failed = [0], []

    def load():
        while not stop.is_set():
            try:
                net.get("/count", timeout=5)
                answered[0] += 1
            except OSError as error:
                failed.append(repr(error))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    rounds = []
    for _ in range(10):
        box.checkpoint(lab.image(), "--leave-running")
        rounds.append(box.times["checkpoint"])
    stop.set()
    for thread in threads:
        thread.join()
    leave = {"checkpoints": len(rounds), "answered": answered[0], "failed": failed, "max_ms": max(rounds)}

    # Stop mode: connect while it checkpoints, then restore and probe.
    dead = []
    for number in range(10):
        stop = threading.Event()

        def knock():
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    net.connect(timeout=0.2).close()

        threads = [threading.Thread(target=knock) for _ in range(2)]
        for thread in threads:
            thread.start()
        image = lab.image()
        box.checkpoint(image)
        stop.set()
        for thread in threads:
            thread.join()
        box.destroy()
        net.rebuild()
        box = Sandbox(lab, net)
        try:
            box.restore(image, wait=None)
            net.wait(timeout=4)
        except OSError as error:
            dead.append(f"round {number}: {error!r}")
            break
    lab.undo(mark)
    return {"leave-running under load": leave, "stop under load": {"rounds": number + 1, "dead_listeners": dead}}


EPOLL_GUEST = """
import asyncio, json, os, secrets
nonce = secrets.token_hex(8)
hits = 0
async def ticker():
    global hits
    while True:
        await asyncio.sleep(0.01)
        hits += 1
async def serve(reader, writer):
    while (line := await reader.readline()) and line.strip():
        pass
    body = json.dumps({"nonce": nonce, "ticks": hits}).encode()
    writer.write(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    await writer.drain()
    writer.close()
async def main():
    read, write = os.pipe()
    os.set_blocking(read, False)
    asyncio.get_running_loop().add_reader(read, lambda: os.read(read, 1))
    asyncio.create_task(ticker())
    server = await asyncio.start_server(serve, "0.0.0.0", 8080)
    async with server:
        await server.serve_forever()
asyncio.run(main())
"""


def epoll(lab, rounds=30):
    """(k) Does an epoll loop go on after a restore, 30 times in a row?"""
    mark = lab.mark()
    (lab.guest / "epoll.py").write_text(EPOLL_GUEST)

    def change(value):
        value["process"]["args"] = ["/usr/bin/python3", "-S", "/guest/epoll.py"]

    net = Net(lab)
    box = Sandbox(lab, net, change=change).boot()
    nonce = net.get("/")["nonce"]
    hung = []
    for number in range(rounds):
        image = lab.image()
        box.checkpoint(image)
        box.destroy()
        net.rebuild()
        box = Sandbox(lab, net, change=change)
        box.restore(image, wait=None)
        try:
            first = net.wait("/", timeout=5)
            time.sleep(0.1)
            second = net.get("/")
        except OSError as error:
            hung.append(f"round {number}: {error!r}")
            break
        if first["nonce"] != nonce or second["ticks"] <= first["ticks"]:
            hung.append(f"round {number}: {first} then {second}")
    lab.undo(mark)
    return {"rounds": number + 1, "hung": hung}


def half_open(lab):
    """How long a guest waits on a connection whose peer is gone after a restore elsewhere."""
    out = {}
    for flag in ("true", "false"):
        mark = lab.mark()
        net = Net(lab)
        flags = (f"--allow-live-tcp-migration={flag}",)
        box = Sandbox(lab, net, flags=flags).boot()
        idle = net.connect(9000)
        idle.sendall(b"hello\n")
        select.select([idle], [], [], 2)
        image = lab.image()
        box.checkpoint(image)
        box.destroy()
        net = Net(lab)
        again = Sandbox(lab, net, flags=flags)
        again.restore(image)
        time.sleep(1)
        table = net.get("/read?path=/proc/net/tcp")
        rows = [line.split() for line in table.splitlines()[1:]]
        out[f"live-tcp-migration={flag}"] = {
            # State 01 is ESTABLISHED; local port 9000 is 0x2328.
            "established_to_a_peer_that_is_gone": sum(
                1 for row in rows if row[3] == "01" and row[1].endswith(":2328")
            ),
        }
        idle.close()
        lab.undo(mark)
    return out


EXPERIMENTS = {
    "connections-leave-running": connections_leave_running,
    "connections-restored": connections_restored,
    "connections-many": connections_many,
    "half-open": half_open,
    "epoll": epoll,
}
