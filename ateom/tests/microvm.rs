// SPDX-License-Identifier: Apache-2.0
//! Snapshots of microVMs on a real QEMU: shared by clones, refused where anything of the machine differs or is damaged.
mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Worker, sh};
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::ateom::*;
use substrate_proto::types::Compatibility;

fn steps(steps: &[StepTime]) -> String {
    steps.iter().map(|s| format!("{}={:.1}", s.name, s.micros as f64 / 1000.0)).collect::<Vec<_>>().join(" ")
}

fn step_ms(steps: &[StepTime], name: &str) -> f64 {
    steps.iter().filter(|s| s.name == name).map(|s| s.micros as f64 / 1000.0).sum()
}

/// Pids of the worker's QEMUs.
fn machines(worker: &Worker) -> Vec<i32> {
    let name = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    worker.cgroup.processes().unwrap().into_iter().filter(|pid| name(pid).starts_with("qemu")).collect()
}

/// What of a file's mapping a process has in memory, KiB: all of it, its proportional share, and its own pages.
fn resident(pid: i32, file: &Path) -> (u64, u64, u64) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut here, mut found) = (false, (0, 0, 0));
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if first.contains('-') {
            here = line.ends_with(&file.display().to_string());
        }
        let value = || second.parse::<u64>().unwrap();
        match first {
            "Rss:" if here => found.0 += value(),
            "Pss:" if here => found.1 += value(),
            "Anonymous:" if here => found.2 += value(),
            _ => {}
        }
    }
    found
}

fn sum(file: &Path) -> Vec<u8> {
    std::process::Command::new("sha256sum").arg(file).output().unwrap().stdout[..64].to_vec()
}

/// A copy of a snapshot with another memory file.
fn damaged(image: &Path, to: &Path, change: impl FnOnce(&std::fs::File)) -> PathBuf {
    std::fs::create_dir(to).unwrap();
    for name in ["devices", "memory"] {
        std::fs::copy(image.join(name), to.join(name)).unwrap();
    }
    change(&std::fs::File::options().write(true).open(to.join("memory")).unwrap());
    to.to_owned()
}

type Change = (&'static str, fn(&mut Compatibility));

/// One for each field that a restore depends on.
const CHANGES: [Change; 13] = [
    ("sandbox_class", |needed| needed.sandbox_class = "gvisor".into()),
    ("runtime_digest", |needed| needed.runtime_digest = "0".repeat(64)),
    ("architecture", |needed| needed.architecture = "arm64".into()),
    ("cpu_features", |needed| needed.cpu_features.push("avx512f".into())),
    ("facts.vmm", |needed| drop(needed.facts.insert("vmm".into(), "firecracker".into()))),
    ("facts.machine", |needed| drop(needed.facts.insert("machine".into(), "pc-q35-6.2".into()))),
    ("facts.kernel", |needed| drop(needed.facts.insert("kernel".into(), "0".repeat(64)))),
    ("facts.agent", |needed| drop(needed.facts.insert("agent".into(), "0".into()))),
    ("facts.cpu", |needed| drop(needed.facts.insert("cpu".into(), "host".into()))),
    ("facts.devices", |needed| drop(needed.facts.insert("devices".into(), "virtio-rng-pci".into()))),
    ("facts.disks", |needed| drop(needed.facts.insert("disks".into(), "image0 image1".into()))),
    ("facts.memory_mib", |needed| drop(needed.facts.insert("memory_mib".into(), "4096".into()))),
    ("facts.rootfs.counter", |needed| drop(needed.facts.insert("rootfs.counter".into(), "0".repeat(64)))),
];

#[tokio::test]
async fn a_snapshot_is_shared_by_clones_and_refused_by_other_machines() {
    let mut first = Worker::start_microvm("vm-a").await;
    let mut second = Worker::start_microvm("vm-b").await;
    let who = first.assignment("alice", 1);
    let before = Instant::now();
    let booted = first.run(&who, first.guest()).await.unwrap();
    println!("boot {:.1} ms: {}", before.elapsed().as_secs_f64() * 1e3, steps(&booted.steps));
    let (_, nonce) = first.count(&who);
    let image = first.dir.path().join("image");
    let saved = first.checkpoint(&who, &image, Mode::Stop).await.unwrap();
    println!("suspend: {}", steps(&saved.steps));
    assert_eq!(
        saved.files.iter().map(|f| (f.name.as_str(), f.memory)).collect::<Vec<_>>(),
        [("devices", false), ("memory", true)]
    );
    let compatibility = saved.compatibility.unwrap();
    let memory = image.join("memory");
    let saved_sum = sum(&memory);
    let allocated = {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(&memory).unwrap().blocks() / 2
    };
    first.wait_phase(Phase::Empty).await;

    // Each field by itself: refused by its name, before any machine is started.
    let mut generation = 1;
    for (field, change) in CHANGES {
        generation += 1;
        let who = first.assignment("alice", generation);
        let mut needed = compatibility.clone();
        change(&mut needed);
        let spec = first.guest();
        let refused = first.restore(&who, spec, &image, &needed).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{field}: {refused}");
        assert!(refused.message().contains(field), "{field}: {refused}");
        assert!(machines(&first).is_empty(), "{field}: a machine was started");
        assert_eq!(first.status().await.phase(), Phase::Empty, "{field}");
    }
    // Another shape of the actor itself.
    let mut larger = first.guest();
    larger.memory_bytes *= 2;
    let who = first.assignment("alice", 50);
    let refused = first.restore(&who, larger, &image, &compatibility).await.unwrap_err();
    assert!(refused.message().contains("memory_mib"), "{refused}");

    // Damaged files: said, and the slot goes on.
    let short = damaged(&image, &first.dir.path().join("short"), |file| file.set_len(1 << 20).unwrap());
    let who = first.assignment("alice", 51);
    let spec = first.guest();
    let refused = first.restore(&who, spec, &short, &compatibility).await.unwrap_err();
    assert!(refused.message().contains("damaged"), "{refused}");
    first.wait_prepared().await;
    let mute = damaged(&image, &first.dir.path().join("mute"), |_| ());
    std::fs::write(mute.join("devices"), b"QEVM and no more").unwrap();
    let who = first.assignment("alice", 52);
    let spec = first.guest();
    let refused = first.restore(&who, spec, &mute, &compatibility).await.unwrap_err();
    assert!(refused.message().contains("load of migration failed"), "{refused}");
    first.wait_prepared().await;

    // Another build of ours: its initramfs is of another length and content. And a snapshot of the first builds, which
    // named the initramfs instead of what its agent speaks.
    let mut initramfs =
        std::fs::File::options().append(true).open(second.dir.path().join("state/initramfs")).unwrap();
    std::io::Write::write_all(&mut initramfs, &vec![0; 1 << 20]).unwrap();
    let mut old = compatibility.clone();
    old.facts.remove("agent").unwrap();
    old.facts.insert("initramfs".into(), "0".repeat(64));
    second.wait_prepared().await;
    let who = second.assignment("bob", 1);
    let spec = second.guest();
    second.restore(&who, spec, &image, &old).await.unwrap();
    assert_eq!(second.count(&who), (2, nonce.clone()));
    second.terminate(&who).await.unwrap();

    // Two clones at once share the file's pages, and neither writes to it.
    second.wait_prepared().await;
    let (one, two) = (first.assignment("alice", 60), second.assignment("bob", 2));
    let (spec_one, spec_two) = (first.guest(), second.guest());
    let restored = first.restore(&one, spec_one, &image, &compatibility).await.unwrap();
    println!("restore: {}", steps(&restored.steps));
    let restored = second.restore(&two, spec_two, &image, &compatibility).await.unwrap();
    println!("restore of a second: {}", steps(&restored.steps));
    assert_eq!(first.count(&one), (2, nonce.clone()));
    assert_eq!(second.count(&two), (2, nonce.clone()));
    assert_eq!(second.count(&two), (3, nonce.clone()));
    let of_second = resident(machines(&second)[0], &memory);
    println!(
        "touched {allocated} KiB; second clone: resident {} KiB, PSS {} KiB, own {} KiB",
        of_second.0, of_second.1, of_second.2
    );
    assert!(of_second.0 > 0, "it does not map the snapshot's file");
    assert!(of_second.2 * 10 <= allocated * 3, "the second clone adds {} of {allocated} KiB", of_second.2);
    assert_eq!(sum(&memory), saved_sum, "a clone wrote to the snapshot");

    // A checkpoint of a running clone copies what it has written, while it stands still, and the rest afterwards.
    let next = second.dir.path().join("next");
    let kept = second.checkpoint(&two, &next, Mode::KeepRunning).await.unwrap();
    println!("checkpoint, kept running: {}", steps(&kept.steps));
    assert_eq!(second.count(&two), (4, nonce.clone()));
    let fill = "head -c 32000000 /dev/urandom > /tmp/fill";
    assert_eq!(second.exec(&two, sh(fill), b"").await.0, 0);
    let filled = second.dir.path().join("filled");
    let kept = second.checkpoint(&two, &filled, Mode::KeepRunning).await.unwrap();
    let per_10_mb = step_ms(&kept.steps, "memory") / 3.2;
    println!("with 32 MB written: {}; {per_10_mb:.1} ms per 10 MB", steps(&kept.steps));
    let (code, written, _) = second.exec(&two, sh("sha256sum < /tmp/fill"), b"").await;
    assert_eq!(code, 0);

    // Both snapshots are whole: the second is restored where the first clone was.
    first.terminate(&one).await.unwrap();
    first.wait_prepared().await;
    let compatibility = kept.compatibility.unwrap();
    let one = first.assignment("alice", 61);
    let spec = first.guest();
    first.restore(&one, spec, &filled, &compatibility).await.unwrap();
    assert_eq!(first.exec(&one, sh("sha256sum < /tmp/fill"), b"").await.1, written);
    assert_eq!(first.count(&one), (5, nonce.clone()));
    first.terminate(&one).await.unwrap();
    first.wait_prepared().await;
    let one = first.assignment("alice", 62);
    let spec = first.guest();
    first.restore(&one, spec, &next, &compatibility).await.unwrap();
    assert_eq!(first.count(&one), (4, nonce));
    first.terminate(&one).await.unwrap();
    second.terminate(&two).await.unwrap();
    first.shutdown().await;
    second.shutdown().await;
}

/// Writes files with their sums until it is told to stop, never more than eight.
const CHURN: &str = "i=0; while [ ! -e /tmp/stop ]; do f=/tmp/churn.$((i % 8)); rm -f $f.sum; \
     head -c 400000 /dev/urandom > $f; sha256sum $f > $f.sum; i=$((i + 1)); done; touch /tmp/stopped";

/// Ends it; what it wrote has to be what it wrote.
const VERIFY: &str = "touch /tmp/stop; for i in $(seq 600); do [ -e /tmp/stopped ] && break; sleep 0.1; done; \
     [ -e /tmp/stopped ] && sha256sum -c /tmp/churn.*.sum && cat /tmp/churn.*.sum | wc -l";

/// PAGEMAP_SCAN and asynchronous write protection.
fn kernel_notes_writes() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut parts = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (6, 7)
}

#[tokio::test]
async fn a_machine_that_was_booted_is_copied_before_it_stands_still() {
    // A copy that is not whole may well stand still for ever.
    let done = tokio::time::timeout(Duration::from_mins(4), copied_ahead()).await;
    done.expect("not done in 4 minutes");
}

async fn copied_ahead() {
    let mut worker = Worker::start_microvm("vm-c").await;
    let who = worker.assignment("alice", 1);
    let guest = worker.guest();
    worker.run(&who, guest).await.unwrap();
    let (_, nonce) = worker.count(&who);
    let fill = "head -c 64000000 /dev/urandom > /tmp/fill && sha256sum < /tmp/fill";
    let (code, written, _) = worker.exec(&who, sh(fill), b"").await;
    assert_eq!(code, 0);
    let churn = format!("({CHURN}) > /dev/null 2>&1 &");
    assert_eq!(worker.exec(&who, sh(&churn), b"").await.0, 0);
    // A second one begins with everything noted.
    let mut kept = None;
    for round in 0..2 {
        let image = worker.dir.path().join(format!("live{round}"));
        let answer = worker.checkpoint(&who, &image, Mode::KeepRunning).await.unwrap();
        println!("checkpoint of a booted machine: {}", steps(&answer.steps));
        let (ahead, stopped) = (step_ms(&answer.steps, "ahead"), step_ms(&answer.steps, "memory"));
        if kernel_notes_writes() {
            assert!(ahead > 0.0 && stopped * 3.0 < ahead, "{stopped:.1} ms stopped, {ahead:.1} ms before");
        } else {
            eprintln!("skipped: this kernel is older than 6.7 and does not note what is written");
        }
        kept = Some((image, answer.compatibility.unwrap()));
    }
    assert_eq!(worker.count(&who), (2, nonce.clone()), "it did not go on");
    let (code, sums, _) = worker.exec(&who, sh(VERIFY), b"").await;
    assert_eq!(code, 0, "{sums}");
    worker.terminate(&who).await.unwrap();
    worker.wait_prepared().await;
    // The copy is whole, although it was made while the guest wrote.
    let (image, compatibility) = kept.unwrap();
    let who = worker.assignment("alice", 2);
    let spec = worker.guest();
    worker.restore(&who, spec, &image, &compatibility).await.unwrap();
    assert_eq!(worker.count(&who), (2, nonce));
    assert_eq!(worker.exec(&who, sh("sha256sum < /tmp/fill"), b"").await.1, written);
    let (code, sums, _) = worker.exec(&who, sh(VERIFY), b"").await;
    assert_eq!(code, 0, "{sums}");
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

/// The distribution's QEMU, unless a file beside it says that it dies or hangs where a machine is to start.
fn moody(dir: &Path) -> (PathBuf, PathBuf) {
    let (path, mood) = (dir.join("qemu"), dir.join("mood"));
    std::fs::write(&mood, "well\n").unwrap();
    let script = format!(
        "#!/bin/sh\nread -r mood < {}\ncase \"$mood$1\" in\n\
         dies-nodefaults) echo 'no machine today' >&2; exit 3 ;;\n\
         hangs-nodefaults) exec /bin/sleep 1000 ;;\nesac\nexec {} \"$@\"\n",
        mood.display(),
        common::qemu().display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    (path, mood)
}

/// A monitor that says the right things when it is asked for its version, and then dies or hangs.
async fn starts_badly() {
    let dir = tempfile::tempdir().unwrap();
    let (qemu, mood) = moody(dir.path());
    let mut worker = Worker::start_microvm_on("vm-m", qemu).await;
    for (generation, how, said) in [(1, "dies", "no machine today"), (2, "hangs", "did not end within 30 s")]
    {
        worker.wait_prepared().await;
        std::fs::write(&mood, how).unwrap();
        let who = worker.assignment("alice", generation);
        let spec = worker.guest();
        let refused = worker.run(&who, spec).await.unwrap_err();
        assert!(refused.message().contains("QEMU") && refused.message().contains(said), "{how}: {refused}");
        worker.wait_phase(Phase::Empty).await;
    }
    // The slot is as good as new.
    std::fs::write(&mood, "well\n").unwrap();
    worker.wait_prepared().await;
    let who = worker.assignment("alice", 3);
    let spec = worker.guest();
    worker.run(&who, spec).await.unwrap();
    assert_eq!(worker.count(&who).0, 1);
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

/// A monitor that stands still while its guest runs: a checkpoint gives it up, and the slot takes the next.
async fn stands_still() {
    let mut worker = Worker::start_microvm("vm-s").await;
    let who = worker.assignment("bob", 1);
    let spec = worker.guest();
    worker.run(&who, spec).await.unwrap();
    worker.set_lease("bob", 1, common::boottime_in(600.0)).await.unwrap();
    let pid = nix::unistd::Pid::from_raw(machines(&worker)[0]);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let image = worker.dir.path().join("image");
    let refused = worker.checkpoint(&who, &image, Mode::Stop).await.unwrap_err();
    let said = refused.message();
    assert!(said.contains("did not end within 30 s") && said.contains("could not go on"), "{refused}");
    worker.wait_phase(Phase::Lost).await;
    worker.terminate(&who).await.unwrap();
    worker.wait_prepared().await;
    assert!(machines(&worker).is_empty(), "it is left behind");
    let who = worker.assignment("bob", 2);
    let spec = worker.guest();
    worker.run(&who, spec).await.unwrap();
    assert_eq!(worker.count(&who).0, 1);
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn a_monitor_that_dies_hangs_or_stands_still_is_said_and_the_slot_goes_on() {
    let both = async { tokio::join!(starts_badly(), stands_still()) };
    tokio::time::timeout(std::time::Duration::from_mins(4), both).await.expect("it hangs");
}
