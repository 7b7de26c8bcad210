# SPDX-License-Identifier: Apache-2.0
"""What things cost: time by heap size and option, and an idle sandbox."""

import os
import pathlib
import time

from .harness import Net, Sandbox, ms, quantile


def sizes(image):
    """The files of an image in MB, and what they take on disk."""
    return {
        path.name: [round(path.stat().st_size / 1e6, 2), round(path.stat().st_blocks * 512 / 1e6, 2)]
        for path in sorted(image.iterdir())
    }


def fsync_all(image):
    """Makes an image durable; milliseconds."""
    before = time.monotonic()
    for path in [*image.iterdir(), image]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return ms(time.monotonic() - before)


def drop(path):
    """Takes a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def heap(lab, megabytes=(0, 64, 256, 1024), rounds=3):
    """(i) Checkpoint and restore by heap size and by option, of random and of zero pages."""
    out = {}
    for kind in ("random", "zero"):
        for size in megabytes:
            if kind == "zero" and size not in (256, 1024):
                continue
            mark = lab.mark()
            net = Net(lab)
            box = Sandbox(lab, net).boot()
            if size:
                net.get(f"/alloc?mb={size}&kind={kind}", timeout=120)
            nonce = net.get("/count")["nonce"]
            row = {}
            variants = {
                "plain": (),
                "--direct": ("--direct",),
                "--exclude-committed-zero-pages": ("--exclude-committed-zero-pages",),
            }
            images = {}
            for label, options in variants.items():
                times, syncs = [], []
                for _ in range(rounds):
                    image = lab.image()
                    box.checkpoint(image, "--leave-running", *options)
                    times.append(box.times["checkpoint"])
                    syncs.append(fsync_all(image))
                    if label in images:
                        for path in image.iterdir():
                            path.unlink()
                    else:
                        images[label] = image
                row[f"checkpoint {label}"] = {"p50": quantile(times, 0.5), "fsync": quantile(syncs, 0.5)}
            row["files, MB [length, on disk]"] = {label: sizes(image) for label, image in images.items()}
            box.destroy()
            for label, options in {
                "plain": (),
                "--background": ("--background",),
                "--direct": ("--direct",),
                "cold page cache": (),
                "cold page cache, --background": ("--background",),
            }.items():
                times, all_loaded = [], []
                for _ in range(rounds):
                    net.rebuild()
                    again = Sandbox(lab, net)
                    again.create_root()
                    if label.startswith("cold"):
                        for path in images["plain"].iterdir():
                            drop(path)
                    before = time.monotonic()
                    assert again.restore(images["plain"], *options, created=True)["nonce"] == nonce
                    times.append(again.times["restore"])
                    if options == ("--background",):
                        lab.runsc("wait", "--restore", again.id, check=False)
                        all_loaded.append(ms(time.monotonic() - before))
                    again.destroy()
                row[f"restore {label}"] = {"first answer p50": quantile(times, 0.5), "max": max(times)}
                if all_loaded:
                    row[f"restore {label}"]["all pages loaded"] = quantile(all_loaded, 0.5)
            out[f"{size} MB {kind}"] = row
            lab.undo(mark)
            for image in images.values():
                for path in image.iterdir():
                    path.unlink()
    return out


def huge_pages(lab, megabytes=(0, 256, 1024), rounds=5):
    """Restore with huge pages for shared memory (changes a setting of the machine and puts it back)."""
    setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    found = setting.read_text().split("[")[1].split("]")[0]
    out = {"as found": found}
    lab.defer(lambda: setting.write_text(found))
    for value in ("never", "advise"):
        setting.write_text(value)
        for size in megabytes:
            mark = lab.mark()
            net = Net(lab)
            box = Sandbox(lab, net).boot()
            if size:
                net.get(f"/alloc?mb={size}", timeout=120)
            image = lab.image()
            box.checkpoint(image)
            saved = box.times["checkpoint"]
            box.destroy()
            times = []
            for _ in range(rounds):
                net.rebuild()
                again = Sandbox(lab, net)
                again.create_root()
                again.restore(image, created=True)
                times.append(again.times["restore"])
                again.destroy()
            out[f"{value}, {size} MB"] = {
                "checkpoint": saved,
                "restore p50": quantile(times, 0.5),
                "files": sizes(image)["pages.img"],
            }
            lab.undo(mark)
            for path in image.iterdir():
                path.unlink()
    return out


def idle(lab):
    """(l) What an idle sandbox takes: memory, processor, processes, threads."""
    out = {}
    for label, single, started in (
        ("created pause root", False, False),
        ("pause root and agent, ticking 50 times a second", False, True),
        ("pause root and sleeping process", False, None),
    ):
        mark = lab.mark()
        net = Net(lab)

        def sleeps(value):
            value["process"]["args"] = ["/bin/sleep", "100000"]

        box = Sandbox(lab, net, single=single, change=sleeps if started is None else None)
        tag = box.id.partition("-")[0]
        if started:
            box.boot()
        else:
            box.create_root()
            if started is None:
                lab.runsc("start", box.id)
                lab.runsc("create", "--bundle", box.bundles[box.ids[0]], box.ids[0])
                lab.runsc("start", box.ids[0])
        time.sleep(1)
        members = processes(tag)
        before = sum(cpu(pid) for pid in members)
        begun = time.monotonic()
        time.sleep(10)
        used = (sum(cpu(pid) for pid in members) - before) / (time.monotonic() - begun)
        table = {}
        for pid, name in members.items():
            entry = table.setdefault(name, {"count": 0, "rss_mb": 0.0, "private_mb": 0.0, "threads": 0})
            entry["count"] += 1
            entry["threads"] += len(os.listdir(f"/proc/{pid}/task"))
            rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
            facts = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
            entry["rss_mb"] = round(entry["rss_mb"] + facts["Rss"] / 1024, 1)
            entry["private_mb"] = round(
                entry["private_mb"] + (facts["Private_Clean"] + facts["Private_Dirty"]) / 1024, 1
            )
        out[label] = {"processor_percent_of_a_core": round(used * 100, 2), "processes": table}
        lab.undo(mark)
    return out


def processes(tag):
    """Every process of a sandbox, by the ids in the command lines and then by descent."""
    parents, names, roots = {}, {}, set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            line = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        pid = int(entry)
        parents[pid] = int(stat.rpartition(")")[2].split()[1])
        names[pid] = line.split("\0")[0] or stat.split("(")[1].split(")")[0]
        if f"{tag}-" in line and names[pid].startswith("runsc-"):
            roots.add(pid)
    found = {}
    for pid in parents:
        above = pid
        while above and above not in roots:
            above = parents.get(above, 0)
        if above:
            found[pid] = names[pid] if pid in roots else "stub"
    return found


def cpu(pid):
    """Seconds of processor time of a process."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def commands(lab, rounds=20):
    """What one runsc command costs by itself."""
    mark = lab.mark()
    net = Net(lab)
    box = Sandbox(lab, net).boot()
    out = {}
    for label, args in (
        ("--version", ("--version",)),
        ("state", ("state", box.id)),
        ("kill -0", ("kill", box.ids[0], "0")),
        ("events -stats", ("events", "-stats", box.id)),
    ):
        times = [ms(lab.runsc(*args, check=False)[2]) for _ in range(rounds)]
        out[label] = {"p50": quantile(times, 0.5), "max": max(times)}
    lab.undo(mark)
    return out


EXPERIMENTS = {"heap": heap, "idle": idle, "commands": commands}
# Run only when they are named, because they change the machine for others.
ON_REQUEST = {"huge-pages": huge_pages}
