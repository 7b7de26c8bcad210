# SPDX-License-Identifier: Apache-2.0
"""Drives runsc directly, so that what is seen is runsc's doing and nobody else's.

A `Lab` owns a scratch directory, the root filesystems and everything that was
started; leaving it ends all of that. A `Net` is the pair of network namespaces
of a worker: the sandbox's own and the one where its packets come out. A
`Sandbox` is a set of containers under one root container.
"""

import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

REPO = pathlib.Path(__file__).resolve().parent.parent.parent
INNER = "169.254.17.2"
OUTER = "169.254.17.1"
CLONE_NEWNET = 0x40000000
PR_SET_CHILD_SUBREAPER = 36
libc = ctypes.CDLL(None, use_errno=True)


class RunscError(Exception):
    """A runsc command that ended with another code than 0."""

    def __init__(self, args, code, text):
        super().__init__(f"runsc {' '.join(args)}: exit {code}: {text.strip()[-400:]}")
        self.code = code
        self.text = text


def say(text):
    print(text, file=sys.stderr, flush=True)


def ms(seconds):
    return round(seconds * 1000, 1)


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


def ip(*lines):
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, capture_output=True)


def in_netns(name, work):
    """Runs work in a thread inside a network namespace; its sockets stay there."""
    box = {}

    def body():
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
        try:
            if libc.setns(fd, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            box["value"] = work()
        except BaseException as error:  # handed to the caller
            box["error"] = error
        finally:
            os.close(fd)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["value"]


def pause_binary():
    """A static ELF that waits for signals for ever: pause() in a loop, 140 bytes."""
    code = b"\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7"
    base, offset = 0x400000, 64 + 56
    size = offset + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + offset, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code


class Net:
    """A sandbox's network namespace, a veth, and the namespace at its other end."""

    count = 0

    def __init__(self, lab):
        Net.count += 1
        self.tag = f"rf{os.getpid()}x{Net.count}"
        self.actor, self.worker = f"{self.tag}a", f"{self.tag}w"
        ip(f"netns add {self.actor}", f"netns add {self.worker}")
        lab.defer(self.close)
        self.rebuild()

    def rebuild(self):
        """A fresh veth: the sandbox takes the address off the one it starts with."""
        subprocess.run(["ip", "-n", self.worker, "link", "del", "w0"], capture_output=True, check=False)
        subprocess.run(
            ["ip", "-n", self.worker, "link", "add", "w0", "type", "veth", "peer", "name", "eth0", "netns", self.actor],
            check=True,
        )
        for name, device, address in ((self.worker, "w0", OUTER), (self.actor, "eth0", INNER)):
            subprocess.run(
                ["ip", "-n", name, "-batch", "-"],
                input=f"addr add {address}/30 dev {device}\nlink set {device} up\nlink set lo up\n",
                text=True,
                check=True,
            )
        subprocess.run(
            ["ip", "-n", self.actor, "route", "add", "default", "via", OUTER], check=True, capture_output=True
        )

    def to_host(self):
        """Moves the outer end to the host."""
        name = self.tag
        subprocess.run(
            ["ip", "-n", self.worker, "link", "set", "w0", "name", name, "netns", str(os.getpid())], check=True
        )
        ip(f"addr add {OUTER}/30 dev {name}", f"link set {name} up")

    def addresses(self):
        out = subprocess.run(
            ["ip", "-n", self.actor, "-j", "addr"], check=True, capture_output=True, text=True
        ).stdout
        return {
            link["ifname"]: [a["local"] for a in link["addr_info"] if a["family"] == "inet"]
            for link in json.loads(out)
        }

    def connect(self, port=8080, timeout=5.0):
        return in_netns(self.worker, lambda: socket.create_connection((INNER, port), timeout=timeout))

    def get(self, path, timeout=5.0, port=8080):
        client = http.client.HTTPConnection(INNER, port)
        client.sock = self.connect(port, timeout)
        client.sock.settimeout(timeout)
        try:
            client.request("GET", path)
            return json.loads(client.getresponse().read())
        finally:
            client.close()

    def wait(self, path="/state", timeout=20.0):
        """Waits for the first answer; its value."""
        end = time.monotonic() + timeout
        while True:
            try:
                return self.get(path, timeout=max(end - time.monotonic(), 0.1))
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.002)

    def echo_server(self):
        """A server at the worker's end that answers each line; it counts resets."""
        seen = {"resets": 0, "lines": 0, "accepted": 0}
        listener = in_netns(self.worker, lambda: socket.create_server((OUTER, 0)))

        def serve(connection):
            seen["accepted"] += 1
            with connection:
                try:
                    while data := connection.recv(4096):
                        seen["lines"] += data.count(b"\n")
                        connection.sendall(b"pong\n")
                except OSError:
                    seen["resets"] += 1

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return listener.getsockname()[1], seen

    def close(self):
        for name in (self.actor, self.worker):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Lab:
    """Scratch space, root filesystems and everything that must be ended."""

    def __init__(self, runsc):
        self.runsc_path = str(runsc)
        self.flags = []
        parent = REPO / "target" / "bench"
        parent.mkdir(parents=True, exist_ok=True)
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="runsc-facts-", dir=parent))
        # Where sockets are: their path must be short.
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="rf"))
        self.deferred = [lambda: shutil.rmtree(self.dir, True), self._remove_root]
        self.number = 0
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.rootfs = self._unpack_image()
        self.pause_rootfs = self.dir / "pause"
        for name in ("dev", "proc", "sys", "etc", "run/ate"):
            (self.pause_rootfs / name).mkdir(parents=True)
        (self.pause_rootfs / "pause").write_bytes(pause_binary())
        (self.pause_rootfs / "pause").chmod(0o755)
        self.guest = self.dir / "guest"
        self.guest.mkdir()
        shutil.copy(pathlib.Path(__file__).parent / "guest.py", self.guest)

    def _remove_root(self):
        """Removes runsc's --root; its gofers' shared network namespace is mounted in there."""
        for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
            path = line.split()[1]
            if path.startswith(f"{self.root}/"):
                subprocess.run(["umount", path], check=True)
        shutil.rmtree(self.root)

    def _unpack_image(self):
        layout = REPO / "target" / "images" / "counter"
        subprocess.run([REPO / "scripts" / "build-image", "counter"], check=True, stdout=subprocess.DEVNULL)
        blobs = layout / "blobs" / "sha256"
        index = json.loads((layout / "index.json").read_text())
        manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
        rootfs = self.dir / "rootfs"
        for layer in manifest["layers"]:
            with tarfile.open(blobs / layer["digest"][7:]) as archive:
                archive.extractall(rootfs, numeric_owner=True, filter="tar")
        (rootfs / "guest").mkdir()
        return rootfs

    def defer(self, work):
        self.deferred.append(work)

    def mark(self):
        return len(self.deferred)

    def undo(self, mark=0):
        """Ends what was started since the mark, newest first."""
        while len(self.deferred) > mark:
            try:
                self.deferred.pop()()
            except Exception as error:  # the next one still has to go
                say(f"  cleaning up: {error}")

    def name(self, what):
        self.number += 1
        return f"{what}{self.number}"

    def image(self):
        path = self.dir / self.name("image")
        path.mkdir()
        return path

    def runsc(self, *args, check=True, flags=(), timeout=120, cgroup=None):
        """Runs one runsc command to its end: (code, output, seconds).

        Standard output and error go to a file: a sandbox keeps those of its
        creator, and a pipe would never close.
        """
        args = [str(a) for a in args]
        command = [
            self.runsc_path, "--root", str(self.root), "--platform=systrap", "--network=sandbox",
            "--overlay2=root:memory", "--ignore-cgroups", *self.flags, *flags, *args,
        ]  # fmt: skip
        before = time.monotonic()
        with tempfile.TemporaryFile(dir=self.dir) as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=(lambda: (cgroup / "cgroup.procs").write_text("0")) if cgroup else None,
            )
            # Popen.wait polls with growing pauses; a pidfd says it at once.
            # Orphans of a sandbox become our children, and runsc delete waits
            # for their end, so they are reaped meanwhile.
            ended = os.pidfd_open(process.pid)
            try:
                while not select.select([ended], [], [], 0.005 if "delete" in args else 1)[0]:
                    self.reap(process.pid)
                    if time.monotonic() - before > timeout:
                        process.kill()
            finally:
                os.close(ended)
            process.wait()
            took = time.monotonic() - before
            output.seek(0)
            text = output.read().decode("utf-8", "replace")
        if check and process.returncode != 0:
            raise RunscError(args, process.returncode, text)
        return process.returncode, text, took

    def reap(self, *keep):
        """Reaps orphans that fell to us, never the children that Popen waits for."""
        with contextlib.suppress(OSError):
            children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for pid in map(int, children):
                if pid in keep:
                    continue
                with contextlib.suppress(OSError, IndexError):
                    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
                    if stat.rpartition(")")[2].split()[0] == "Z" and stat.split("(")[1].startswith(("runsc", "exe")):
                        os.waitpid(pid, os.WNOHANG)

    def state(self, cid):
        code, text, _ = self.runsc("state", cid, check=False)
        return json.loads(text)["status"] if code == 0 else None

    def delete(self, cid):
        return self.runsc("delete", "-force", cid, check=False)


def mounts(extra=()):
    """The usual mounts of a container."""
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        *extra,
    ]


def bind(source, destination, *options):
    return {
        "destination": destination,
        "type": "bind",
        "source": str(source),
        "options": ["rbind", *(options or ("ro",))],
    }


def spec(rootfs, args, net, annotations=None, extra_mounts=(), **process):
    """An OCI runtime specification; keyword arguments go into its process."""
    return {
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [str(a) for a in args],
            "env": ["PATH=/usr/bin:/bin", "LANG=C.UTF-8"],
            "cwd": "/",
            "capabilities": {k: ["CAP_NET_BIND_SERVICE"] for k in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 65536, "soft": 65536}],
            **process,
        },
        "root": {"path": str(rootfs), "readonly": False},
        "hostname": "actor",
        "mounts": mounts(extra_mounts),
        "annotations": annotations or {},
        "linux": {
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
                {"type": "network", "path": f"/run/netns/{net.actor}"},
            ]
        },
    }


class Sandbox:
    """A root container and any number of others, under names that survive a restore.

    With `single` the workload is the root container itself; otherwise the root
    is the pause program and the workloads are containers beside it.
    """

    def __init__(self, lab, net, single=False, workloads=1, change=None, root_change=None, ate=None, flags=()):
        self.lab, self.net, self.single, self.flags = lab, net, single, flags
        # runsc takes a unique prefix for an id, so no id may be another's prefix.
        tag = lab.name("s")
        self.id = f"{tag}-pause"
        self.ids = []
        self.times = {}
        self.ate = ate or lab.dir / f"ate-{self.id}"
        self.ate.mkdir(exist_ok=True)
        if ate is None:
            (self.ate / "name").write_text(f"name of {self.id}")
        self.bundles = {}
        extra = [bind(lab.guest, "/guest"), bind(self.ate, "/run/ate")]
        if single:
            self._bundle(self.id, spec(lab.rootfs, ["/usr/bin/python3", "-S", "/guest/guest.py"], net, {}, extra), change)
        else:
            pause = {
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.container-name": "pause",
            }
            root = spec(lab.pause_rootfs, ["/pause"], net, pause)
            self._bundle(self.id, root, root_change)
            for number in range(workloads):
                cid = f"{tag}-work{number}"
                self.ids.append(cid)
                names = {
                    "io.kubernetes.cri.container-type": "container",
                    "io.kubernetes.cri.sandbox-id": self.id,
                    "io.kubernetes.cri.container-name": f"work{number}",
                }
                args = ["/usr/bin/python3", "-S", "/guest/guest.py", 8080 + number]
                self._bundle(cid, spec(lab.rootfs, args, net, names, extra), change)
        lab.defer(self.destroy)

    def _bundle(self, cid, value, change):
        path = self.lab.dir / f"bundle-{cid}"
        path.mkdir()
        if change:
            change(value)
        (path / "config.json").write_text(json.dumps(value))
        self.bundles[cid] = path

    def all(self):
        return [self.id, *self.ids]

    def timed(self, step, *args, **options):
        _, text, took = self.lab.runsc(*args, flags=self.flags, **options)
        self.times[step] = ms(took)
        return text

    def create_root(self, **options):
        self.timed("create root", "create", "--bundle", self.bundles[self.id], self.id, **options)

    def boot(self, timeout=20.0):
        """Creates and starts everything; waits for the first answer."""
        before = time.monotonic()
        self.create_root()
        self.timed("start root", "start", self.id)
        for cid in self.ids:
            self.timed("create work", "create", "--bundle", self.bundles[cid], cid)
            self.timed("start work", "start", cid)
        self.net.wait(timeout=timeout)
        self.times["boot"] = ms(time.monotonic() - before)
        return self

    def checkpoint(self, image, *options, **how):
        self.timed("checkpoint", "checkpoint", "--image-path", image, *options, self.id, **how)

    def restore(self, image, *options, created=False, wait="/state"):
        """Restores root and workloads; `created` says that the root exists already."""
        before = time.monotonic()
        if not created:
            self.create_root()
        how = ("--image-path", image, "--detach", *options)
        self.timed("restore root", "restore", *how, "--bundle", self.bundles[self.id], self.id)
        for cid in self.ids:
            self.timed("create work", "create", "--bundle", self.bundles[cid], cid)
            self.timed("restore work", "restore", *how, "--bundle", self.bundles[cid], cid)
        answer = self.net.wait(wait) if wait else None
        self.times["restore"] = ms(time.monotonic() - before)
        return answer

    def restore_overlapped(self, image):
        """Restores into a root created ahead, creating the one workload at the same time."""
        before = time.monotonic()
        how = ("--image-path", image, "--detach")
        cid = self.ids[0]
        create = threading.Thread(
            target=self.timed, args=("create work", "create", "--bundle", self.bundles[cid], cid)
        )
        create.start()
        self.timed("restore root", "restore", *how, "--bundle", self.bundles[self.id], self.id)
        create.join()
        self.timed("restore work", "restore", *how, "--bundle", self.bundles[cid], cid)
        answer = self.net.wait("/state")
        self.times["restore"] = ms(time.monotonic() - before)
        return answer

    def pids(self):
        """Host processes of this sandbox: those whose command line names its id."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    line = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                    if self.id.encode() in line and line[0].startswith(b"runsc-"):
                        found.append((int(entry), line[0].decode()))
        return found

    def destroy(self):
        before = time.monotonic()
        for cid in reversed(self.all()):
            self.lab.delete(cid)
        self.times["delete"] = ms(time.monotonic() - before)

    def kill(self):
        for pid, _ in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
