# SPDX-License-Identifier: Apache-2.0
"""From create to delete: what can be prepared, in which order things go, how they end."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading
import time

from .harness import INNER, OUTER, Net, RunscError, Sandbox, ms, quantile


def tried(work):
    """What work answers, or the text of what it fails with."""
    try:
        return work()
    except RunscError as error:
        return f"exit {error.code}: {error.text.strip()[-300:]}"
    except OSError as error:
        return repr(error)


def states(lab, box):
    """What runsc state says of a dead sandbox while its process is a zombie, and after."""
    zombie = [lab.state(cid) for cid in box.all()]
    lab.reap()
    return {"before its process is reaped": zombie, "after": [lab.state(cid) for cid in box.all()]}


def created_ahead(lab, rounds=10):
    """(b) What does a root created ahead save: cold boot, checkpoint and restore, step by step."""
    steps = {}

    def note(kind, times):
        for step, value in times.items():
            steps.setdefault(kind, {}).setdefault(step, []).append(value)

    for _ in range(rounds):
        for single in (True, False):
            kind = "workload is the root" if single else "pause root and workload"
            mark = lab.mark()
            net = Net(lab)
            box = Sandbox(lab, net, single=single).boot()
            nonce = net.get("/count")["nonce"]
            kept = lab.image()
            box.checkpoint(kept, "--leave-running")
            note(kind, {"checkpoint --leave-running": box.times["checkpoint"]})
            image = lab.image()
            box.checkpoint(image)
            box.destroy()
            note(kind, {k: box.times[k] for k in ("boot", "checkpoint", "delete")})
            for created in (False, True):
                net.rebuild()
                again = Sandbox(lab, net, single=single)
                if created:
                    again.create_root()
                assert again.restore(image, created=created)["nonce"] == nonce
                label = f"{kind}, restore into a root created ahead" if created else f"{kind}, create and restore"
                note(label, again.times)
                again.destroy()
            if not single:
                net.rebuild()
                again = Sandbox(lab, net)
                again.create_root()
                assert again.restore_overlapped(image)["nonce"] == nonce
                note(f"{kind}, restore into a root created ahead, workload created meanwhile", again.times)
            lab.undo(mark)
    return {
        kind: {step: {"p50": quantile(values, 0.5), "max": max(values)} for step, values in table.items()}
        for kind, table in steps.items()
    }


def overlay(lab):
    """(b) Is --overlay2=root:memory in effect for containers beside the root, across a restore?"""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    before = sorted(p.name for p in lab.rootfs.iterdir())
    net.get("/write?path=/root/note&text=kept")
    net.get("/write?path=/tmp/note&text=kept")
    net.get("/open?path=/root/note")
    # Open and deleted: one file of the overlay's own, one of the image.
    net.get("/write?path=/root/deleted&text=deleted")
    for path in ("/root/deleted", "/app/counter.py"):
        net.get(f"/open?path={path}")
        net.get(f"/unlink?path={path}")
    host = {
        "written_file_on_the_host": (lab.rootfs / "root/note").exists(),
        "deleted_file_on_the_host": (lab.rootfs / "app/counter.py").exists(),
        "rootfs_as_before": before == sorted(p.name for p in lab.rootfs.iterdir()),
    }
    image = lab.image()
    box.checkpoint(image)
    box.destroy()
    copy = lab.dir / "rootfs-elsewhere"
    subprocess.run(["cp", "-a", lab.rootfs, copy], check=True)

    def elsewhere(value):
        value["root"]["path"] = str(copy)

    net.rebuild()
    again = Sandbox(lab, net, change=elsewhere)
    again.restore(image)
    out = {
        **host,
        "after restore from another path": {
            "written": net.get("/read?path=/root/note"),
            "in_tmpfs": net.get("/read?path=/tmp/note"),
            "through_an_open_descriptor": net.get("/reread?path=/root/note"),
            "open_and_deleted": [
                str(net.get("/reread?path=/root/deleted")),
                str(net.get("/reread?path=/app/counter.py"))[:9],
            ],
            "deleted_is_gone": not net.get("/exists?path=/app/counter.py"),
            "host_copy_untouched": (copy / "app/counter.py").exists() and not (copy / "root/note").exists(),
        },
    }
    lab.undo(mark)
    shutil.rmtree(copy)
    return out


def network(lab):
    """(c) What happens to the namespace's interface, and what must be made anew before each start?"""
    out = {}
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net)
    seen = {"before": net.addresses()["eth0"]}
    box.create_root()
    seen["after create"] = net.addresses()["eth0"]
    lab.runsc("start", box.id)
    seen["after start"] = net.addresses()["eth0"]
    routes = subprocess.run(["ip", "-n", net.actor, "route"], capture_output=True, text=True, check=True).stdout
    out["address of eth0"] = {**seen, "routes after start": routes.split("\n")[0]}
    box.destroy()

    def boots(prepare, single=False):
        def work():
            other = Sandbox(lab, net, single=single)
            prepare(other)
            other.create_root()
            lab.runsc("start", other.id)
            for cid in other.ids:
                lab.runsc("create", "--bundle", other.bundles[cid], cid)
                lab.runsc("start", cid)
            answer = net.wait(timeout=3)
            other.destroy()
            return "answers" if answer else "silent"

        return tried(work)

    def only_address(_):
        subprocess.run(["ip", "-n", net.actor, "addr", "add", f"{INNER}/30", "dev", "eth0"], check=True)
        subprocess.run(["ip", "-n", net.actor, "route", "add", "default", "via", OUTER], check=True)

    out["start again in the same namespace"] = boots(lambda _: None)
    lab.undo(mark)
    net = Net(lab)
    first = Sandbox(lab, net).boot()
    first.destroy()
    out["start again after adding the address and the default route"] = boots(only_address)
    lab.undo(mark)

    # The namespace is empty at create; the veth comes before the restore only.
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    net.get("/count")
    image = lab.image()
    box.checkpoint(image)
    box.destroy()
    net.close()
    subprocess.run(["ip", "netns", "add", net.actor], check=True)
    subprocess.run(["ip", "netns", "add", net.worker], check=True)
    again = Sandbox(lab, net)
    again.create_root()
    net.rebuild()
    out["root created in an empty namespace, veth built before restore"] = tried(
        lambda: again.restore(image, created=True) and net.get("/count")["count"] == 2
    )
    again.destroy()

    # The same, but with an address that the snapshot does not know.
    net.rebuild()
    for name, old, new in ((net.actor, INNER, "169.254.99.2"), (net.worker, OUTER, "169.254.99.1")):
        device = "eth0" if name == net.actor else "w0"
        subprocess.run(["ip", "-n", name, "addr", "add", f"{new}/30", "dev", device], check=True)
        subprocess.run(["ip", "-n", name, "addr", "del", f"{old}/30", "dev", device], check=True)
    again = Sandbox(lab, net)

    def other_address():
        again.restore(image, wait=None)
        from .harness import in_netns
        import socket

        with in_netns(net.worker, lambda: socket.create_connection(("169.254.99.2", 8080), 3)):
            return "answers at the new address"

    out["restore with another inner address"] = tried(other_address)
    again.destroy()
    lab.undo(mark)

    net = Net(lab)
    subprocess.run(["ip", "-n", net.actor, "link", "set", "eth0", "down"], check=True)
    out["interface down at start"] = boots(lambda _: None, single=True)
    lab.undo(mark)
    return out


def order(lab):
    """(b) In which order must root and workloads be restored, and what if one is missing?"""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net, workloads=2).boot()
    net.wait("/state", 10)
    image = lab.image()
    box.checkpoint(image)
    out = {"states after a checkpoint that stops": states(lab, box)}
    box.destroy()

    def restore(plan, timeout=4):
        net.rebuild()
        other = Sandbox(lab, net, workloads=2)

        def work():
            for step, number in plan:
                cid = other.all()[number]
                if step == "create":
                    lab.runsc("create", "--bundle", other.bundles[cid], cid)
                else:
                    lab.runsc("restore", "--image-path", image, "--detach", "--bundle", other.bundles[cid], cid)
            net.wait(timeout=timeout)
            return "answers"

        result = tried(work)
        other.destroy()
        return result

    c, r = "create", "restore"
    out["each created then restored"] = restore([(c, 0), (r, 0), (c, 1), (r, 1), (c, 2), (r, 2)])
    out["workloads in the other order"] = restore([(c, 0), (r, 0), (c, 2), (r, 2), (c, 1), (r, 1)])
    out["all created, then all restored"] = restore([(c, 0), (c, 1), (c, 2), (r, 0), (r, 1), (r, 2)])
    out["workload created before the root is restored"] = restore([(c, 0), (c, 1), (r, 0), (r, 1), (c, 2), (r, 2)])
    out["workload restored first"] = restore([(c, 0), (c, 1), (r, 1), (r, 0), (c, 2), (r, 2)])
    out["one workload missing"] = restore([(c, 0), (r, 0), (c, 1), (r, 1)], timeout=2)

    net.rebuild()
    other = Sandbox(lab, net, workloads=2)
    other.create_root()
    lab.runsc("start", other.id)
    out["restore into a started root"] = tried(
        lambda: lab.runsc("restore", "--image-path", image, "--detach", "--bundle", other.bundles[other.id], other.id)
    )
    other.destroy()
    lab.undo(mark)
    return out


def ids(lab):
    """Which container ids get in each other's way?"""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net, single=True)
    short, long = "twin", "twin-b"
    out = {}
    for cid in (short, long):
        lab.runsc("create", "--bundle", box.bundles[box.id], cid)
        lab.defer(lambda cid=cid: lab.delete(cid))
    out["state of an id that is the prefix of another"] = tried(lambda: lab.runsc("state", short)[1][:60])
    lab.undo(mark)
    return out


def execs(lab):
    """(e) exec into a workload: exit codes, users, output; its processes across checkpoint and restore."""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    work = box.ids[0]
    out = {}
    for code in (0, 7, 137):
        out[f"exit code of sh -c 'exit {code}'"] = lab.runsc("exec", work, "/bin/sh", "-c", f"exit {code}", check=False)[0]
    out["exit code after kill -9 of itself"] = lab.runsc("exec", work, "/bin/sh", "-c", "kill -9 $$", check=False)[0]
    out["unknown program"] = lab.runsc("exec", work, "/nowhere", check=False)[:2]
    out["output"] = lab.runsc("exec", "-user", "1000:1000", work, "/bin/sh", "-c", "id -u; pwd; echo $PATH")[1].split()
    times = [ms(lab.runsc("exec", work, "/bin/true")[2]) for _ in range(10)]
    out["ms of exec /bin/true"] = {"p50": quantile(times, 0.5), "max": max(times)}
    fed = subprocess.run(
        [lab.runsc_path, "--root", lab.root, "--ignore-cgroups", "exec", work, "/bin/cat"],
        input=b"through stdin",
        capture_output=True,
        check=False,
        timeout=20,
    )
    out["stdin to stdout"] = fed.stdout.decode()

    # A long exec, then checkpoints around it.
    pidfile = lab.dir / "exec.pid"

    def start_exec():
        lab.runsc("exec", "-detach", "-internal-pid-file", pidfile, work, "/bin/sleep", "1000")
        return pidfile.read_text()

    start_exec()
    out["sleeps before"] = sleeps(net)
    box.checkpoint(lab.image(), "--leave-running")
    out["sleeps after --leave-running"] = sleeps(net)

    waiting = subprocess.Popen(
        [lab.runsc_path, "--root", lab.root, "--ignore-cgroups", "exec", work, "/bin/sleep", "1001"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    time.sleep(0.5)
    image = lab.image()
    box.checkpoint(image)
    try:
        out["attached exec when its sandbox is checkpointed and stops"] = {
            "exit": waiting.wait(5),
            "says": waiting.stderr.read().decode()[-200:],
        }
    except subprocess.TimeoutExpired:
        waiting.kill()
        out["attached exec when its sandbox is checkpointed and stops"] = "hangs"
    waiting.wait()
    box.destroy()
    net.rebuild()
    again = Sandbox(lab, net)
    again.restore(image)
    time.sleep(0.2)
    out["sleeps after restore"] = sleeps(net)
    work = again.ids[0]
    out["exec after restore"] = lab.runsc("exec", work, "/bin/sh", "-c", "exit 5", check=False)[0]
    lab.undo(mark)
    return out


def sleeps(net):
    """The command lines of the sleeps that the guest's /proc shows."""
    found = []
    for entry in net.get("/ps"):
        if entry.isdigit():
            line = net.get(f"/read?path=/proc/{entry}/cmdline")
            if isinstance(line, str) and line.startswith("/bin/sleep"):
                found.append(line.replace("\0", " ").strip())
    return sorted(found)


def ends(lab):
    """(e) How an exit shows: wait, state, events, and what is left of the sandbox."""
    out = {}
    for code, how in ((0, "exit"), (7, "exit"), (9, "signal")):
        mark = lab.mark()
        net = Net(lab)
        box = Sandbox(lab, net).boot()
        work = box.ids[0]
        waiter = subprocess.Popen(
            [lab.runsc_path, "--root", lab.root, "--ignore-cgroups", "wait", work],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(0.3)
        before = time.monotonic()
        if how == "exit":
            with contextlib.suppress(Exception):
                net.get(f"/exit?code={code}", timeout=1)
        else:
            lab.runsc("kill", work, "KILL")
        text = waiter.communicate(timeout=10)[0].decode().strip()
        out[f"{how} {code}"] = {
            "wait": text,
            "wait_exit": waiter.returncode,
            "ms": ms(time.monotonic() - before),
            "state of the workload": lab.state(work),
            "state of the root": lab.state(box.id),
            "wait asked afterwards": tried(lambda: lab.runsc("wait", work, timeout=5)[1].strip()),
        }
        lab.undo(mark)

    # Waiting across a restore, and what a waiter hears of a checkpoint.
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    waiters = {
        name: subprocess.Popen(
            [lab.runsc_path, "--root", lab.root, "--ignore-cgroups", "wait", cid],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for name, cid in (("root", box.id), ("workload", box.ids[0]))
    }
    time.sleep(0.3)
    image = lab.image()
    box.checkpoint(image)
    out["waiters when a checkpoint stops the sandbox"] = {
        name: [waiter.communicate(timeout=10)[0].decode().strip()[-200:], waiter.returncode]
        for name, waiter in waiters.items()
    }
    box.destroy()
    net.rebuild()
    again = Sandbox(lab, net)
    again.restore(image)
    work = again.ids[0]
    waiter = subprocess.Popen(
        [lab.runsc_path, "--root", lab.root, "--ignore-cgroups", "wait", work],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    time.sleep(0.3)
    with contextlib.suppress(Exception):
        net.get("/exit?code=11", timeout=1)
    out["wait after a restore, exit 11"] = waiter.communicate(timeout=10)[0].decode().strip()
    lab.undo(mark)

    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    code, text, took = lab.runsc("events", "-stats", box.ids[0], check=False)
    with contextlib.suppress(ValueError):
        text = json.loads(text)["data"]
        text = {"cpu": text.get("cpu", {}).get("usage"), "memory": text.get("memory", {}).get("usage")}
    out["events -stats"] = {"exit": code, "data": text, "ms": ms(took)}
    box.kill()
    time.sleep(0.3)
    out["sandbox killed"] = {
        **states(lab, box),
        "delete": tried(lambda: [lab.delete(cid)[0] for cid in reversed(box.all())]),
    }
    lab.undo(mark)
    return out


def failed_checkpoint(lab):
    """(g) What a checkpoint that cannot write leaves behind, in both modes."""
    out = {}
    for mode in ((), ("--leave-running",)):
        for case in ("full disk", "missing directory", "not empty"):
            mark = lab.mark()
            net = Net(lab)
            box = Sandbox(lab, net).boot()
            nonce = net.get("/count")["nonce"]
            target = lab.image()
            if case == "full disk":
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", target], check=True)
                lab.defer(lambda target=target: subprocess.run(["umount", "-l", target], check=True))
            elif case == "missing directory":
                target = target / "a" / "b"
            else:
                box.checkpoint(target, "--leave-running")
            code, text, took = lab.runsc("checkpoint", "--image-path", target, *mode, box.id, check=False, timeout=30)
            try:
                alive = net.get("/count", timeout=2)["nonce"] == nonce
            except OSError as error:
                alive = repr(error)
            out[f"{case}, {mode[0] if mode else 'stop'}"] = {
                "exit": code,
                "says": next((line for line in text.splitlines() if line.strip()), "")[:250],
                "still_serving": alive,
            }
            if alive is True and code != 0:
                # Is the survivor whole? Checkpoint and restore it once more.
                image = lab.image()
                box.checkpoint(image)
                box.destroy()
                net.rebuild()
                again = Sandbox(lab, net)
                out[f"{case}, {mode[0] if mode else 'stop'}"]["checkpointed and restored afterwards"] = (
                    again.restore(image)["nonce"] == nonce and net.get("/count")["count"] == 3
                )
                box = again
            box.destroy()
            lab.undo(mark)
    return out


def safe_suspend(lab):
    """(g) Suspend that cannot lose memory: pause, checkpoint --leave-running, then kill or resume."""
    mark = lab.mark()
    net = Net(lab)
    flags = ("--allow-live-tcp-migration=false",)
    times = {"stop": [], "pause, leave running, kill": []}
    counts = []
    box = Sandbox(lab, net, flags=flags).boot()
    for number in range(10):
        safe = number % 2 == 1
        net.get("/count")
        image = lab.image()
        before = time.monotonic()
        if safe:
            lab.runsc("pause", box.id)
            box.checkpoint(image, "--leave-running")
            box.kill()
        else:
            box.checkpoint(image)
        times["pause, leave running, kill" if safe else "stop"].append(ms(time.monotonic() - before))
        box.destroy()
        net.rebuild()
        box = Sandbox(lab, net, flags=flags)
        counts.append(box.restore(image)["count"])
    out = {
        "ms": {how: {"p50": quantile(values, 0.5), "max": max(values)} for how, values in times.items()},
        "nothing_lost": counts == list(range(1, 11)),
    }
    full = lab.image()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", full], check=True)
    # Lazily: a sandbox that survived a failed checkpoint keeps the image's files open.
    lab.defer(lambda: subprocess.run(["umount", "-l", full], check=True))
    lab.runsc("pause", box.id)
    code = lab.runsc("checkpoint", "--image-path", full, "--leave-running", box.id, check=False)[0]
    lab.runsc("resume", box.id)
    out["on a full disk"] = {"exit": code, "after resume": tried(lambda: net.get("/count")["count"]) == 11}
    lab.undo(mark)
    return out


def paused(lab):
    """(g) pause and resume: what they cost, and a checkpoint while paused."""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    net.get("/count")
    out = {}
    times = {"pause": [], "resume": []}
    for _ in range(5):
        for verb, values in times.items():
            values.append(ms(lab.runsc(verb, box.id)[2]))
    out["ms"] = {verb: {"p50": quantile(values, 0.5), "max": max(values)} for verb, values in times.items()}
    lab.runsc("pause", box.id)
    out["states while paused"] = [lab.state(cid) for cid in box.all()]
    try:
        net.get("/count", timeout=0.5)
        out["answers while paused"] = True
    except OSError:
        out["answers while paused"] = False
    image = lab.image()
    code, text, _ = lab.runsc("checkpoint", "--image-path", image, "--leave-running", box.id, check=False)
    out["checkpoint --leave-running while paused"] = [code, text.strip()[-200:]]
    try:
        net.get("/count", timeout=0.5)
        out["runs after that checkpoint without resume"] = True
    except OSError:
        out["runs after that checkpoint without resume"] = False
    code, text, _ = lab.runsc("resume", box.id, check=False)
    out["resume"] = [code, text.strip()[-200:]]
    out["answers after resume"] = tried(lambda: net.get("/count", timeout=2)["count"])
    lab.runsc("pause", box.ids[0], check=False)
    out["states after pausing only the workload"] = [lab.state(cid) for cid in box.all()]
    lab.runsc("resume", box.ids[0], check=False)
    if code == 0:
        box.destroy()
        net.rebuild()
        again = Sandbox(lab, net)
        out["restore of the image made while paused"] = tried(lambda: again.restore(image)["count"])
    lab.undo(mark)
    return out


def cgroup_dir(lab):
    """A fresh cgroup v2 directory, wherever v2 is mounted, or None."""
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            group = pathlib.Path(path) / lab.name("runsc-facts-")
            group.mkdir()

            def remove():
                (group / "cgroup.kill").write_text("1")
                end = time.monotonic() + 5
                while "populated 1" in (group / "cgroup.events").read_text() and time.monotonic() < end:
                    lab.reap()
                    time.sleep(0.01)
                group.rmdir()

            lab.defer(remove)
            return group
    return None


def freeze(lab):
    """(j) cgroup v2: freeze and thaw a whole sandbox, checkpoint after it, kill it."""
    mark = lab.mark()
    group = cgroup_dir(lab)
    if group is None:
        return {"skipped": "no cgroup v2 is mounted"}
    net = Net(lab)
    box = Sandbox(lab, net)
    before = time.monotonic()
    # The sandbox joins by inheritance: runsc itself runs in the cgroup.
    for cid in box.all():
        lab.runsc("create", "--bundle", box.bundles[cid], cid, cgroup=group)
        lab.runsc("start", cid, cgroup=group)
    net.wait()
    out = {"boot_ms": ms(time.monotonic() - before)}
    inside = {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
    names = sorted(pathlib.Path(f"/proc/{pid}/comm").read_text().strip() for pid in inside)
    out["processes in the cgroup"] = {name: names.count(name) for name in dict.fromkeys(names)}
    port, seen = net.echo_server()
    net.get(f"/dial?host={OUTER}&port={port}")

    def frozen(value):
        begun = time.monotonic()
        (group / "cgroup.freeze").write_text("1" if value else "0")
        while f"frozen {int(value)}" not in (group / "cgroup.events").read_text():
            time.sleep(0.0005)
        return ms(time.monotonic() - begun)

    rounds = []
    for seconds in (0.1, 1.0, 5.0):
        ticks = net.get("/state")["ticks"]
        took = frozen(True)
        time.sleep(seconds)
        try:
            net.get("/state", timeout=0.3)
            answered = True
        except OSError:
            answered = False
        thawed = frozen(False)
        state = net.get("/state", timeout=5)
        rounds.append(
            {
                "seconds": seconds,
                "freeze_ms": took,
                "thaw_ms": thawed,
                "answered_while_frozen": answered,
                "ticks_while_frozen": state["ticks"] - ticks,
                "outbound": state["dials"][0],
            }
        )
    out["rounds"] = rounds
    image = lab.image()
    out["checkpoint after thaw"] = tried(lambda: box.checkpoint(image, "--leave-running") or box.times["checkpoint"])

    # What a checkpoint asked of a frozen sandbox does.
    frozen(True)
    code, text, took = lab.runsc(
        "checkpoint", "--image-path", lab.image(), "--leave-running", box.id, check=False, timeout=3
    )
    out["checkpoint while frozen"] = {"exit": code, "ms": ms(took), "says": text.strip()[-200:]}
    out["runsc state while frozen"] = tried(lambda: lab.runsc("state", box.id, timeout=3)[0])
    frozen(False)
    # The request was already in the sandbox's socket: it is carried out now.
    time.sleep(1)
    out["answers 1 s after the thaw"] = tried(lambda: net.get("/count", timeout=3)["count"])
    out["processes 1 s after the thaw"] = len((group / "cgroup.procs").read_text().split())
    frozen(True)
    begun = time.monotonic()
    (group / "cgroup.kill").write_text("1")
    while "populated 1" in (group / "cgroup.events").read_text():
        lab.reap()
        time.sleep(0.0005)
    out["kill of a frozen cgroup until empty, ms"] = ms(time.monotonic() - begun)
    lab.undo(mark)
    return out


def independence(lab):
    """(m) What ties a sandbox to the process that started it: descriptors, sessions, parents."""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net)
    logs = lab.dir / "stdio"
    logs.mkdir()
    common = [lab.runsc_path, "--root", str(lab.root), "--overlay2=root:memory", "--ignore-cgroups"]
    steps = []
    for cid in box.all():
        steps.append([*common, "create", "--bundle", str(box.bundles[cid]), cid])
        steps.append([*common, "start", cid])
    # A parent of its own, with standard output and error in files, that dies.
    script = "import json,subprocess,sys\nfor s in json.loads(sys.argv[1]): subprocess.run(s, check=True)"
    with open(logs / "out", "wb") as stdout, open(logs / "err", "wb") as stderr:
        subprocess.run(
            ["/usr/bin/python3", "-c", script, json.dumps(steps)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            check=True,
        )
    net.wait()
    out = {"answers after its parent is gone": net.get("/count")["count"] == 1, "processes": []}
    for pid, name in box.pids():
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        fds = {}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                kind = re.sub(r":?\[?[0-9]+\]?$|\(deleted\)$", "", target).replace(str(lab.dir), "SCRATCH")
                fds[kind] = fds.get(kind, 0) + 1
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        out["processes"].append(
            {
                "name": name,
                "parent": "reaped by the nearest subreaper" if int(stat[1]) == os.getpid() else int(stat[1]),
                "own session": int(stat[3]) == pid,
                "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
                "descriptors": sum(fds.values()),
                "stdio": [
                    os.path.basename(os.readlink(f"/proc/{pid}/fd/{fd}")) for fd in (0, 1, 2)
                    if os.path.exists(f"/proc/{pid}/fd/{fd}")
                ],
                "kinds": dict(sorted(fds.items(), key=lambda item: -item[1])[:8]),
            }
        )
    lab.undo(mark)

    # A pipe as standard output whose reader goes away.
    net = Net(lab)
    noisy = Sandbox(lab, net, single=True, change=lambda v: v["process"].update(args=[
        "/usr/bin/python3", "-S", "-u", "-c",
        "import threading,time,sys,os\n"
        "sys.path.insert(0,'/guest')\n"
        "sys.argv=['guest.py']\n"
        "exec(open('/guest/guest.py').read().replace('if __name__', \"\"\"\n"
        "def chatter():\n"
        "    while True:\n"
        "        time.sleep(0.02)\n"
        "        try: os.write(1, b'x'*4096)\n"
        "        except OSError as e: state['stdout']=repr(e)\n"
        "threading.Thread(target=chatter,daemon=True).start()\n"
        "if __name__\"\"\", 1))",
    ]))  # fmt: skip
    read, write = os.pipe()
    lab.defer(lambda: [contextlib.suppress(OSError).__enter__() and None, os.close(read)][0])
    process = subprocess.Popen(
        [*common, "run", "--detach", "--bundle", str(noisy.bundles[noisy.id]), noisy.id],
        stdin=subprocess.DEVNULL, stdout=write, stderr=write,
    )  # fmt: skip
    os.close(write)
    process.wait()
    net.wait()
    time.sleep(1.5)
    state = net.get("/state")
    out["stdout is a pipe nobody reads"] = {"serves": True, "max_gap_ms": state["max_gap_ms"]}
    os.close(read)
    lab.deferred.pop()
    time.sleep(0.5)
    state = net.get("/state")
    out["stdout is a pipe whose reader is gone"] = {"serves": True, "guest_sees": state.get("stdout")}
    lab.undo(mark)
    return out


CHATTER = """
import os, sys, threading, time
def chatter():
    number = 0
    while True:
        time.sleep(0.02)
        number += 1
        os.write(1, b"line %d\\n" % number)
threading.Thread(target=chatter, daemon=True).start()
sys.path.insert(0, "/guest")
sys.argv = ["guest.py"]
exec(open("/guest/guest.py").read())
"""


def output(lab):
    """(m) Into which descriptors a workload's output goes, before and after a restore."""
    out = {}

    def change(value):
        value["process"]["args"] = ["/usr/bin/python3", "-S", "-c", CHATTER]

    for single in (True, False):
        for mode in ("wb", "ab"):
            mark = lab.mark()
            net = Net(lab)
            image = lab.image()
            for life in ("booted", "restored"):
                net.rebuild()
                box = Sandbox(lab, net, single=single, change=change)
                # The last container's files are the workload's.
                files = {}
                for cid in box.all():
                    how = ["restore", "--image-path", image, "--detach"] if life == "restored" else ["start"]
                    for step in (["create", "--bundle", box.bundles[cid]], how):
                        path = lab.dir / lab.name("output")
                        files[step[0]] = path
                        with open(path, mode) as file:
                            subprocess.run(
                                [lab.runsc_path, "--root", lab.root, "--overlay2=root:memory", "--ignore-cgroups"]
                                + [*map(str, step), cid],
                                stdin=subprocess.DEVNULL,
                                stdout=file,
                                stderr=file,
                                check=True,
                            )
                net.wait()
                time.sleep(0.3)
                texts = {step: path.read_bytes() for step, path in files.items()}
                kind = "root" if single else "beside the root"
                opened = "O_APPEND" if mode == "ab" else "plain"
                out[f"workload is {kind}, {opened} files, {life}"] = {
                    "written to the descriptors of": [step for step, text in texts.items() if text],
                    "zero bytes at the start": max(len(text) - len(text.lstrip(b"\0")) for text in texts.values()),
                }
                if life == "booted":
                    box.checkpoint(image)
                box.destroy()
            lab.undo(mark)
    return out


def concurrent(lab, count=4):
    """Restores of several sandboxes at once."""
    mark = lab.mark()
    images = []
    for _ in range(count):
        net = Net(lab)
        box = Sandbox(lab, net).boot()
        net.get("/count")
        image = lab.image()
        box.checkpoint(image)
        box.destroy()
        net.rebuild()
        images.append((net, image))
    boxes = []
    for net, image in images:
        box = Sandbox(lab, net)
        box.create_root()
        boxes.append((box, image))
    before = time.monotonic()
    threads = [threading.Thread(target=box.restore, args=(image,), kwargs={"created": True}) for box, image in boxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - before
    out = {"at_once": count, "all_ms": ms(took), "each_ms": [box.times["restore"] for box, _ in boxes]}
    lab.undo(mark)
    return out


EXPERIMENTS = {
    "created-ahead": created_ahead,
    "order": order,
    "overlay": overlay,
    "network": network,
    "ids": ids,
    "exec": execs,
    "ends": ends,
    "failed-checkpoint": failed_checkpoint,
    "safe-suspend": safe_suspend,
    "paused": paused,
    "freeze": freeze,
    "independence": independence,
    "output": output,
    "concurrent": concurrent,
}
