// SPDX-License-Identifier: Apache-2.0
//! Promise P1 on real gVisor: leases, fencing, deaths.
mod common;

use std::time::{Duration, Instant};

use ateom::WorkerRecord;
use common::{Worker, boottime_in};
use substrate_proto::atenet::ingress_opened::Code;
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::ateom::*;

#[tokio::test]
async fn an_actor_freezes_at_its_deadline_thaws_with_it_and_dies_of_a_newer_copy() {
    let mut worker = Worker::start("lease").await;
    worker.wait_prepared().await;
    let who = worker.assignment("alice", 5);
    worker.run(&who, worker.counter()).await.unwrap();
    let (_, nonce) = worker.count(&who);
    let deadline = boottime_in(60.0);
    // A deadline never moves backwards.
    worker.set_lease("alice", 5, boottime_in(0.1)).await.unwrap();
    assert!(worker.status().await.lease_deadline_ns >= deadline - 60_000_000_000);
    assert_eq!(
        worker.set_lease("alice", 4, deadline).await.unwrap_err().code(),
        tonic::Code::FailedPrecondition
    );
    worker.terminate(&who).await.unwrap();

    let who = worker.assignment("alice", 6);
    let spec = worker.counter();
    let request =
        RunRequest { assignment: Some(who.clone()), spec: Some(spec), lease_deadline_ns: boottime_in(10.0) };
    worker.client.run(request).await.unwrap();
    let (_, second) = worker.count(&who);
    assert_ne!(nonce, second);
    let held = worker.dial(&who, 0).unwrap();
    let frozen = worker.wait_phase(Phase::Frozen).await;
    assert!(ateom::boottime_ns() >= frozen.lease_deadline_ns);
    assert_eq!(worker.dial(&who, 0).unwrap_err().0, Code::NotNow);
    let refused = worker.checkpoint(&who, &worker.dir.path().join("i"), Mode::Stop).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    let before = worker.cgroup.stats().cpu_usec;
    drop(held);
    worker.set_lease("alice", 6, boottime_in(60.0)).await.unwrap();
    worker.wait_phase(Phase::Running).await;
    assert_eq!(worker.count(&who), (2, second));
    assert!(worker.cgroup.stats().cpu_usec > before);

    worker.set_lease("alice", 7, boottime_in(60.0)).await.unwrap();
    worker.wait_phase(Phase::Empty).await;
    assert_eq!(worker.dial(&who, 0).unwrap_err().0, Code::Stale);
    let late = worker.run(&who, worker.counter()).await.unwrap_err();
    assert!(late.message().contains("stale"), "{late}");
    worker.shutdown().await;
}

#[tokio::test]
async fn a_frozen_actor_can_be_terminated() {
    let mut worker = Worker::start("frozen").await;
    worker.wait_prepared().await;
    let who = worker.assignment("alice", 1);
    let request = RunRequest {
        assignment: Some(who.clone()),
        spec: Some(worker.counter()),
        lease_deadline_ns: boottime_in(2.0),
    };
    // Whether it is up by then or not makes no difference.
    let mut second = worker.client.clone();
    let running = tokio::spawn(async move { second.run(request).await });
    worker.wait_phase(Phase::Frozen).await;
    let before = Instant::now();
    worker.terminate(&who).await.unwrap();
    assert!(before.elapsed() < Duration::from_secs(2));
    assert_eq!(worker.status().await.phase(), Phase::Empty);
    // Answered either way.
    drop(running.await.unwrap());
    worker.shutdown().await;
}

/// The pid of the sandbox process of a worker's actor.
fn sentry(worker: &Worker) -> i32 {
    let pids = worker.cgroup.processes().unwrap();
    let name = |pid: &i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.into_iter().find(|pid| name(pid).starts_with(b"runsc-sandbox")).expect("no sandbox process")
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn a_killed_sandbox_is_lost_not_exited() {
    let mut worker = Worker::start("sentry").await;
    let who = worker.assignment("alice", 1);
    worker.run(&who, worker.counter()).await.unwrap();
    kill(sentry(&worker));
    let status = worker.wait_phase(Phase::Lost).await;
    assert!(status.exit.is_none());
    assert!(status.message.contains("sentry"), "{}", status.message);
    assert_eq!(worker.dial(&who, 0).unwrap_err().0, Code::Stale);
    worker.terminate(&who).await.unwrap();
    worker.wait_phase(Phase::Empty).await;

    // One that is only prepared is replaced.
    worker.wait_prepared().await;
    kill(sentry(&worker));
    worker.wait_status("unprepared", |status| !status.prepared).await;
    worker.wait_prepared().await;
    worker.shutdown().await;
}

#[tokio::test]
async fn out_of_memory_is_said() {
    let mut worker = Worker::start("oom").await;
    let who = worker.assignment("alice", 1);
    let mut spec = worker.program(&[
        "/usr/bin/python3",
        "-S",
        "-c",
        "x = bytearray(1 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1\nimport signal; signal.pause()",
    ]);
    spec.memory_bytes = 64 << 20;
    drop(worker.run(&who, spec).await);
    let status = worker.wait_phase(Phase::Lost).await;
    assert!(status.message.contains("memory limit"), "{}", status.message);
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn a_killed_ateom_can_be_fenced_and_followed_by_another() {
    let mut worker = Worker::start("killed").await;
    let who = worker.assignment("alice", 1);
    worker.run(&who, worker.counter()).await.unwrap();
    let record = WorkerRecord::load(&worker.dir.path().join("state")).unwrap().unwrap();
    assert_eq!((record.pid as u32, record.is_alive()), (worker.process.id(), true));
    assert!(sentry(&worker) > 0);
    worker.process.kill().unwrap();
    worker.process.wait().unwrap();
    assert!(!record.is_alive());
    // The launcher ends what nobody holds a lease for any more; the node agent makes sure.
    assert!(worker.cgroup.wait_empty(Duration::from_secs(10)).unwrap());
    worker.cgroup.kill_and_wait_empty(Duration::from_secs(10)).unwrap();

    let dir = std::mem::replace(&mut worker.dir, tempfile::tempdir().unwrap());
    std::fs::create_dir_all(worker.dir.path()).unwrap();
    std::fs::write(worker.dir.path().join("log"), "").unwrap();
    drop(worker);
    let mut worker = Worker::start_in("killed", dir).await;
    worker.wait_prepared().await;
    assert_eq!(worker.status().await.phase(), Phase::Empty);
    assert_eq!(std::fs::read_dir(worker.dir.path().join("state/sandboxes")).unwrap().count(), 1);
    let who = worker.assignment("alice", 2);
    worker.run(&who, worker.counter()).await.unwrap();
    assert_eq!(worker.count(&who).0, 1);

    // A second one of the same id is refused.
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_ateom-gvisor"))
        .args(["--worker-id", &worker.id, "--cgroup", "substrate-test/second", "--runsc", "/nope"])
        .arg("--state-dir")
        .arg(worker.dir.path().join("state"))
        .arg("--run-dir")
        .arg(worker.dir.path().join("run"))
        .args(["--egress-socket", "/nope"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && said.contains("another ateom"), "{said}");

    // SIGTERM leaves an actor alone and ends an empty slot.
    let pid = nix::unistd::Pid::from_raw(worker.process.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(worker.count(&who).0, 2);
    worker.terminate(&who).await.unwrap();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(worker.process.wait().unwrap().success());
    assert!(worker.cgroup.children().is_empty());
}

#[tokio::test]
async fn a_missing_or_wrong_runsc_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (runsc, sha, expected) in [
        ("/no/runsc", None, "cannot run /no/runsc"),
        ("/bin/true", None, "cannot checkpoint"),
        ("/bin/true", Some("00"), "pinned is 00"),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ateom-gvisor"));
        let cgroup = format!("substrate-test/t{}-wrong", std::process::id());
        command
            .args(["--worker-id", "wrong", "--cgroup", &cgroup, "--runsc", runsc, "--egress-socket", "/nope"])
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--run-dir")
            .arg(dir.path().join("run"));
        if let Some(sha) = sha {
            command.args(["--runsc-sha256", sha]);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{runsc}: {said}");
        let hierarchy = ateom::cgroup::Hierarchy::detect().unwrap();
        ateom::cgroup::Cgroup::at(&hierarchy, &cgroup).remove().unwrap();
    }
}
