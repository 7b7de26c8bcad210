# SPDX-License-Identifier: Apache-2.0
"""What the benches share: a `substrate up` of their own, the floor beside it, and the figures."""

import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from runsc_facts.harness import REPO, Lab, Net, Sandbox, ms, quantile, say  # noqa: E402

RUNSC = REPO / "target" / "tools" / "runsc"
RELEASE = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target")) / "release"
COUNTER = REPO / "target" / "images" / "counter"


def build():
    """Everything a bench needs, as a user would install it: release binaries, the pinned runsc, the counter image."""
    for command in (
        ["scripts/setup"],
        ["scripts/build-image", "counter", str(COUNTER)],
        ["cargo", "build", "--release", "--locked", "--workspace", "--bins"],
    ):
        subprocess.run(command, cwd=REPO, check=True, stdout=sys.stderr)


class Machine:
    """A `substrate up` in a directory of its own, with one counter actor."""

    def __init__(self, workers=2, more=()):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="sb-"))
        self.dir = self.root / "d"
        self.log = open(self.root / "up.err", "w", encoding="utf-8")
        self.process = subprocess.Popen(
            [RELEASE / "substrate", "up", "--json", "--dir", self.dir, "--workers", str(workers),
             "--listen", "127.0.0.1:0", "--runsc", RUNSC, *more],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"substrate up ended: {(self.root / 'up.err').read_text()}")
        host, port = json.loads(line)["ingress"].rsplit(":", 1)
        self.ingress = (host, int(port))
        self.token = None

    def cli(self, *args, text=None):
        done = subprocess.run(
            [RELEASE / "substrate", "--socket", self.dir / "run" / "ateapi.sock", *args],
            input=text, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"substrate {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def counter(self, name):
        """A counter actor that only the bench suspends."""
        template = {
            "kind": "ActorTemplate",
            "name": "counter",
            "spec": {
                "containers": [
                    {
                        "name": "main",
                        "image": f"oci:{COUNTER}",
                        "ports": [8080],
                        "readiness": {"httpGet": {"path": "/healthz", "port": 8080}},
                    }
                ],
                "idle": {"suspendAfter": "never"},
            },
        }
        self.cli("apply", "-f", "-", text=json.dumps(template))
        self.cli("create", "actor", name, "--template", "counter", "--wait")
        self.token = self.cli("token").strip()
        return self.get(name)

    def get(self, name, path="/"):
        """One request through the router: (answer, seconds until its first byte)."""
        headers = {"ate-actor": f"default/{name}", "ate-authorization": f"Bearer {self.token}"}
        client = http.client.HTTPConnection(*self.ingress, timeout=60)
        try:
            before = time.monotonic()
            client.request("GET", path, headers=headers)
            answer = client.getresponse()
            took = time.monotonic() - before
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{name}{path} answered {answer.status}: {body[:400]!r}")
            return json.loads(body), took
        finally:
            client.close()

    def wait(self, name, seconds):
        """Until it answers."""
        end = time.monotonic() + seconds
        while True:
            try:
                return self.get(name)
            except (RuntimeError, OSError) as error:
                if time.monotonic() > end:
                    raise RuntimeError(f"{name} does not answer: {error}") from error
                time.sleep(0.5)

    def control_group(self, name):
        """The populated control group of an actor that runs, on a machine with this one `substrate up` alone."""
        worker = json.loads(self.cli("get", "actor", name, "-o", "json"))["worker"]
        found = [
            group
            for group in pathlib.Path("/sys/fs/cgroup").glob(f"**/substrate*/{worker}/actor-*")
            if (group / "cgroup.kill").exists() and self.owns(group)
        ]
        if len(found) != 1:
            raise RuntimeError(f"control groups of {name} on {worker}: {found}")
        return found[0]

    def owns(self, group):
        pids = (group / "cgroup.procs").read_text().split()
        lines = (pathlib.Path(f"/proc/{pid}/cmdline") for pid in pids)
        return any(str(self.dir).encode() in line.read_bytes() for line in lines)

    def suspend(self, name):
        """Suspends an actor: seconds until its control group is empty, and until its snapshot is durable."""
        group = self.control_group(name)
        before = time.monotonic()
        call = subprocess.Popen(
            [RELEASE / "substrate", "--socket", self.dir / "run" / "ateapi.sock", "suspend", name],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        free = None
        while free is None and time.monotonic() < before + 60:
            try:
                if "populated 0" in (group / "cgroup.events").read_text():
                    free = time.monotonic() - before
            except OSError:
                free = time.monotonic() - before
            time.sleep(0.0005)
        _, text = call.communicate(timeout=60)
        if call.returncode != 0 or free is None:
            raise RuntimeError(f"suspend of {name}: {text.strip()}")
        return free, time.monotonic() - before

    def steps(self, name):
        """The named parts of a resume, in seconds."""
        answer = json.loads(self.cli("resume", name, "-o", "json"))
        return {step["name"]: step["ms"] / 1000 for step in answer["steps"]}

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()
        shutil.rmtree(self.root, ignore_errors=True)


class Floor:
    """The same pause and counter pair under bare runsc, in a namespace prepared ahead."""

    def __init__(self):
        self.lab = Lab(RUNSC)
        self.lab.flags = ["--allow-live-tcp-migration=false"]
        self.net = Net(self.lab)

    def sandbox(self):
        def counter(config):
            config["process"]["args"] = entrypoint()

        return Sandbox(self.lab, self.net, change=counter)

    def close(self):
        self.lab.undo()


def entrypoint():
    """What the counter image runs."""
    blobs = COUNTER / "blobs" / "sha256"
    index = json.loads((COUNTER / "index.json").read_text())
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())["config"]
    return (config.get("Entrypoint") or []) + (config.get("Cmd") or [])


@contextlib.contextmanager
def both(workers=2):
    """A machine and its floor, both ended afterwards."""
    with contextlib.ExitStack() as stack:
        floor = Floor()
        stack.callback(floor.close)
        machine = Machine(workers)
        stack.callback(machine.close)
        yield machine, floor


def report(ours, floor, **more):
    """The last line: quantiles of both (seconds in, ms out) and their ratio."""
    figures = {
        "p50_ms": ms(quantile(ours, 0.5)),
        "p95_ms": ms(quantile(ours, 0.95)),
        "floor_p50_ms": ms(quantile(floor, 0.5)),
        "floor_p95_ms": ms(quantile(floor, 0.95)),
        "p95_ratio": round(quantile(ours, 0.95) / quantile(floor, 0.95), 3),
        "rounds": len(ours),
        **more,
    }
    print(json.dumps(figures))


__all__ = ["Floor", "Machine", "both", "build", "ms", "quantile", "report", "say"]
