# SPDX-License-Identifier: Apache-2.0
"""What a restore refuses, what it takes without a word, and what stays visible of the new specification."""

import contextlib
import os
import re
import shutil
import subprocess
import time

from .harness import Net, RunscError, Sandbox, bind


def short(text):
    """The line that says why, without paths and dumps."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    line = next((line for line in lines if "panic" not in line.lower()), lines[0] if lines else "")
    return re.sub(r"/\S*/(image|bundle|rootfs)", r"\1", line)[:260]


def a_snapshot(lab, net, **how):
    """A booted, counted and checkpointed sandbox: (image, nonce)."""
    box = Sandbox(lab, net, **how).boot()
    nonce = net.get("/count")["nonce"]
    image = lab.image()
    box.checkpoint(image)
    box.destroy()
    return image, nonce


def try_restore(lab, net, image, nonce, look=None, flags=(), **how):
    """Restores; "restored", with what look answers, or why not."""
    net.rebuild()
    box = Sandbox(lab, net, flags=flags, **how)
    try:
        answer = box.restore(image, wait=None) or net.wait(timeout=4)
        result = "restored" if answer["nonce"] == nonce else "BOOTED AFRESH"
        return {"result": result, **({"seen": look()} if look else {})} if look else result
    except RunscError as error:
        left = [lab.state(cid) for cid in box.all()]
        return f"refused: {short(error.text)} [left: {left}]"
    except OSError as error:
        return f"silent: {error!r}"
    finally:
        box.destroy()


def spec_changes(lab):
    """(d) Which changes of the specification does --restore-spec-validation=enforce refuse?"""
    mark = lab.mark()
    net = Net(lab)
    (lab.dir / "other").mkdir()
    (lab.dir / "other" / "name").write_text("from another directory")
    shutil.copy(lab.guest / "guest.py", lab.dir / "other")

    def process(**changes):
        return lambda value: value["process"].update(changes)

    def add_mount(value):
        value["mounts"].append(bind(lab.dir / "other", "/opt"))

    def drop_mount(value):
        value["mounts"] = [m for m in value["mounts"] if m["destination"] != "/run/ate"]

    def reorder(value):
        value["mounts"].reverse()

    def source(value):
        for mount in value["mounts"]:
            if mount["destination"] == "/run/ate":
                mount["source"] = str(lab.dir / "other")

    def options(value):
        for mount in value["mounts"]:
            if mount["destination"] == "/run/ate":
                mount["options"] = ["rbind", "rw"]

    def readonly(value):
        value["root"]["readonly"] = True

    def resources(value):
        value["linux"]["resources"] = {"memory": {"limit": 1 << 29}, "cpu": {"quota": 50000, "period": 100000}}

    def namespace(value):
        value["linux"]["namespaces"].append({"type": "cgroup"})

    def renamed(value):
        value["annotations"]["io.kubernetes.cri.container-name"] = "another"

    def annotation(value):
        value["annotations"]["org.example.note"] = "other"

    def flag_annotation(value):
        value["annotations"]["dev.gvisor.spec.mount.x.share"] = "pod"

    args = ["/usr/bin/python3", "-S", "/guest/guest.py", "8080"]
    caps = {k: ["CAP_NET_BIND_SERVICE", "CAP_CHOWN"] for k in ("bounding", "effective", "permitted")}
    cases = {
        "nothing": lambda value: None,
        "env": process(env=["PATH=/usr/bin:/bin", "NEW=1"]),
        "args": process(args=[*args, "more"]),
        "args[0] to another directory": process(args=["/bin/python3", *args[1:]]),
        "cwd": process(cwd="/tmp"),
        "user": process(user={"uid": 1000, "gid": 1000}),
        "additional gids": process(user={"uid": 0, "gid": 0, "additionalGids": [5]}),
        "umask": process(user={"uid": 0, "gid": 0, "umask": 0o77}),
        "capabilities": process(capabilities=caps),
        "rlimits": process(rlimits=[{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]),
        "terminal": process(terminal=True),
        "noNewPrivileges": process(noNewPrivileges=True),
        "oomScoreAdj": process(oomScoreAdj=500),
        "hostname": lambda value: value.update(hostname="other"),
        "mount added": add_mount,
        "mount removed": drop_mount,
        "mounts in another order": reorder,
        "mount source": source,
        "mount options": options,
        "root.readonly": readonly,
        "linux.resources": resources,
        "linux.namespaces": namespace,
        "cgroupsPath": lambda value: value["linux"].update(cgroupsPath="/elsewhere"),
        "maskedPaths": lambda value: value["linux"].update(maskedPaths=["/proc/kcore"]),
        "ociVersion": lambda value: value.update(ociVersion="1.1.0"),
        "container-name": renamed,
        "annotation of others": annotation,
        "annotation dev.gvisor.*": flag_annotation,
        "hooks": lambda value: value.update(hooks={}),
    }
    image, nonce = a_snapshot(lab, net)
    out = {name: try_restore(lab, net, image, nonce, change=change) for name, change in cases.items()}
    out["env, hostname and args as the process sees them after a change of env and hostname"] = try_restore(
        lab,
        net,
        image,
        nonce,
        look=lambda: {
            "hostname": net.get("/state")["hostname"],
            "env": net.get("/state")["env"].get("NEW"),
            "spec_environ": str(net.get("/read?path=/proc/gvisor/spec_environ"))[:120],
        },
        change=lambda value: (
            value.update(hostname="other"),
            value["process"].update(env=["PATH=/usr/bin:/bin", "NEW=1"]),
        ),
    )
    for policy in ("warning", "ignore"):
        out[f"args, --restore-spec-validation={policy}"] = try_restore(
            lab,
            net,
            image,
            nonce,
            change=cases["args"],
            flags=(f"--restore-spec-validation={policy}",),
        )
    lab.undo(mark)
    return out


def late_binding(lab):
    """(d) What a process sees of a read-only mount whose files change, while it runs and across a restore."""
    mark = lab.mark()
    out = {}
    net = Net(lab)

    def rewrite(path):
        path.write_text("other content, longer than before")

    def rename_over(path):
        (path.parent / "temporary").write_text("other content, longer than before")
        (path.parent / "temporary").rename(path)

    def unlink(path):
        path.unlink()

    def cannot(work):
        try:
            work()
            return "saved"
        except RunscError as error:
            return f"refused: {short(error.text)}"

    for how in (rewrite, rename_over, unlink):
        for use in ("untouched", "read and closed", "open"):
            net.rebuild()
            box = Sandbox(lab, net).boot()
            before = net.get("/count")["nonce"]
            if use == "open":
                net.get("/open?path=/run/ate/name")
            elif use == "read and closed":
                net.get("/read?path=/run/ate/name")
            how(box.ate / "name")
            seen = {"by path": net.get("/read?path=/run/ate/name")}
            if use == "open":
                seen["through the descriptor"] = net.get("/reread?path=/run/ate/name")
            seen["checkpoint --leave-running"] = cannot(lambda box=box: box.checkpoint(lab.image(), "--leave-running"))
            try:
                seen["still serving"] = net.get("/count", timeout=2)["nonce"] == before
            except OSError as error:
                seen["still serving"] = repr(error)
            out[f"while running: {how.__name__}, {use}"] = {
                k: v if isinstance(v, (str, bool)) else v.get("error", v) for k, v in seen.items()
            }
            box.destroy()

    net.rebuild()
    box = Sandbox(lab, net).boot()
    for name in ("opened", "closed"):
        (box.ate / name).write_text("before")
    net.get("/open?path=/run/ate/opened")
    net.get("/read?path=/run/ate/closed")
    nonce = net.get("/count")["nonce"]
    image = lab.image()
    box.checkpoint(image)
    box.destroy()
    for case, names in (
        ("all files there, other content", ("name", "opened", "closed", "added")),
        ("one missing that was read and closed", ("name", "opened", "added")),
        ("one missing that was open", ("name", "closed", "added")),
    ):
        ate = lab.dir / case.replace(" ", "-").replace(",", "")
        ate.mkdir()
        for name in names:
            (ate / name).write_text(f"new {name}")
        out[f"restore: {case}"] = try_restore(
            lab,
            net,
            image,
            nonce,
            ate=ate,
            look=lambda: {
                "opened, through the descriptor": net.get("/reread?path=/run/ate/opened"),
                "opened": net.get("/read?path=/run/ate/opened"),
                "closed": net.get("/read?path=/run/ate/closed"),
                "added": net.get("/read?path=/run/ate/added"),
                "writing is": net.get("/write?path=/run/ate/x&text=y"),
            },
        )
    lab.undo(mark)
    return out


def rootfs_changes(lab):
    """What a restore says of a root filesystem that is not the one of the checkpoint."""
    mark = lab.mark()
    net = Net(lab)
    image, nonce = a_snapshot(lab, net)
    out = {}

    def with_rootfs(label, alter):
        copy = lab.dir / "altered"
        subprocess.run(["cp", "-a", lab.rootfs, copy], check=True)
        alter(copy)
        out[label] = try_restore(
            lab, net, image, nonce, change=lambda value: value["root"].update(path=str(copy))
        )
        shutil.rmtree(copy)

    with_rootfs("same content elsewhere", lambda root: None)
    with_rootfs("an unused file is missing", lambda root: (root / "usr/bin/tarcat").unlink(missing_ok=True))
    interpreter = os.path.realpath(lab.rootfs / "usr/bin/python3").rpartition("/")[2]
    with_rootfs("the program is missing", lambda root: (root / "usr/bin" / interpreter).unlink())

    def cut(root):
        with open(root / "usr/bin" / interpreter, "r+b") as file:
            file.truncate(4096)

    with_rootfs("the program is truncated", cut)
    with_rootfs("the program has another time", lambda root: os.utime(root / "usr/bin" / interpreter, (1, 1)))
    lab.undo(mark)
    return out


def media(lab):
    """Which overlay settings survive a restore elsewhere?"""
    mark = lab.mark()
    out = {}
    for label, flags in (
        ("root:memory", ("--overlay2=root:memory",)),
        ("root:self (the default)", ("--overlay2=root:self",)),
        ("none", ("--overlay2=none",)),
    ):
        net = Net(lab)
        box = Sandbox(lab, net, flags=flags).boot()
        net.get("/write?path=/root/note&text=kept")
        nonce = net.get("/count")["nonce"]
        image = lab.image()
        box.checkpoint(image)
        box.destroy()
        on_host = (lab.rootfs / "root/note").exists()
        with contextlib.suppress(OSError):
            (lab.rootfs / "root/note").unlink()
        out[label] = {
            "written to the host": on_host,
            "restore": try_restore(
                lab, net, image, nonce, look=lambda net=net: net.get("/read?path=/root/note"), flags=flags
            ),
        }
        out[label]["restore under root:memory"] = (
            try_restore(lab, net, image, nonce) if label != "root:memory" else "the same"
        )
        lab.undo(mark)
        for stray in lab.rootfs.glob(".gvisor.filestore.*"):
            stray.unlink()
    return out


def broken_images(lab):
    """(h) What runsc says to images that are damaged."""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    net.get("/alloc?mb=8")
    nonce = net.get("/count")["nonce"]
    image = lab.image()
    box.checkpoint(image)
    box.destroy()
    out = {}

    def flip(path, offset):
        with open(path, "r+b") as file:
            file.seek(offset if offset >= 0 else path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))

    def truncate(path):
        os.truncate(path, path.stat().st_size // 2)

    for name in ("checkpoint.img", "pages_meta.img", "pages.img"):
        for case, alter in (
            ("missing", lambda path: path.unlink()),
            ("empty", lambda path: os.truncate(path, 0)),
            ("truncated", truncate),
            ("first byte flipped", lambda path: flip(path, 0)),
            ("a bit flipped in the middle", lambda path: flip(path, -1)),
        ):
            copy = lab.image()
            shutil.copytree(image, copy, dirs_exist_ok=True)
            alter(copy / name)
            out[f"{name}: {case}"] = try_restore(lab, net, copy, nonce)
    lab.undo(mark)
    return out


def uniqueness(lab):
    """Do two clones of one image draw the same random numbers?"""
    mark = lab.mark()
    net = Net(lab)
    image, _ = a_snapshot(lab, net)
    drawn = []
    for _ in range(2):
        net.rebuild()
        box = Sandbox(lab, net)
        box.restore(image)
        drawn.append((net.get("/urandom"), net.get("/read?path=/proc/sys/kernel/random/boot_id")))
        box.destroy()
    lab.undo(mark)
    return {"urandom differs": drawn[0][0] != drawn[1][0], "boot_id": [str(d[1]) for d in drawn]}


def clocks(lab):
    """What the guest's clocks show after 3 s spent as a file."""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    before = net.get("/state")
    image = lab.image()
    box.checkpoint(image)
    box.destroy()
    time.sleep(3)
    net.rebuild()
    again = Sandbox(lab, net)
    after = again.restore(image)
    out = {
        "wall clock behind the host by s": round(time.time() - after["wall"], 2),
        "monotonic advanced by s": round(after["monotonic"] - before["monotonic"], 2),
    }
    lab.undo(mark)
    return out


EXPERIMENTS = {
    "spec-changes": spec_changes,
    "late-binding": late_binding,
    "rootfs-changes": rootfs_changes,
    "overlay-media": media,
    "broken-images": broken_images,
    "uniqueness": uniqueness,
    "clocks": clocks,
}
