// SPDX-License-Identifier: Apache-2.0
//! What happens when something goes wrong on the way, on real gVisor: hooks, failed checkpoints, cut requests, ends
//! in the middle of a start.
mod common;

use std::io::Read as _;
use std::time::{Duration, Instant};

use common::{Worker, boottime_in, sh};
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::ateom::*;
use substrate_proto::types::{Hook, Hooks};

fn hook(script: &str) -> Hook {
    Hook { container: String::new(), command: ["/bin/sh", "-c", script].map(str::to_owned).into() }
}

#[tokio::test]
async fn hooks_run_before_and_after_and_a_clone_needs_its_own() {
    let mut worker = Worker::start("hooks").await;
    let who = worker.assignment("alice", 1);
    let mut spec = worker.counter();
    spec.hooks = Some(Hooks {
        before_snapshot: Some(hook("echo before >> /tmp/hooks")),
        after_restore: Some(hook("echo after >> /tmp/hooks")),
    });
    worker.run(&who, spec.clone()).await.unwrap();
    let image = worker.dir.path().join("image");
    let saved = worker.checkpoint(&who, &image, Mode::Stop).await.unwrap();
    assert!(saved.steps.iter().any(|step| step.name == "hook"));
    let compatibility = saved.compatibility.unwrap();
    let who = worker.assignment("alice", 2);
    worker.restore(&who, spec.clone(), &image, &compatibility).await.unwrap();
    assert_eq!(worker.exec(&who, sh("cat /tmp/hooks"), b"").await.1, "before\nafter\n");
    worker.terminate(&who).await.unwrap();

    // One that fails is told of, and not fatal for the actor itself.
    spec.hooks = Some(Hooks { before_snapshot: None, after_restore: Some(hook("exit 3")) });
    let mut events = worker.client.watch(WatchRequest {}).await.unwrap().into_inner();
    let who = worker.assignment("alice", 3);
    worker.restore(&who, spec.clone(), &image, &compatibility).await.unwrap();
    let notice = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            if let Some(slot_event::Event::Notice(notice)) = events.message().await.unwrap().unwrap().event {
                return notice;
            }
        }
    });
    let notice = notice.await.unwrap();
    assert!(notice.reason == "HOOK_FAILED" && notice.message.contains("code 3"), "{notice:?}");
    drop(events);
    worker.terminate(&who).await.unwrap();

    // A clone would go on under the original's identity.
    let who = worker.assignment("bob", 1);
    let request = RestoreRequest {
        assignment: Some(who),
        spec: Some(spec),
        directory: image.display().to_string(),
        compatibility: Some(compatibility),
        lease_deadline_ns: boottime_in(60.0),
        clone: true,
    };
    let refused = worker.client.restore(request).await.unwrap_err();
    assert!(refused.message().contains("identity"), "{refused}");
    worker.wait_phase(Phase::Empty).await;
    worker.shutdown().await;
}

/// A file system with room for two files, so that writing the third fails as on a full disk.
struct Full(std::path::PathBuf);

impl Full {
    fn mount(path: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let options = Some("size=1g,nr_inodes=3");
        nix::mount::mount(Some("full"), &path, Some("tmpfs"), nix::mount::MsFlags::empty(), options).unwrap();
        Self(path)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_checkpoint_that_fails_loses_nothing() {
    let mut worker = Worker::start("full").await;
    let who = worker.assignment("alice", 1);
    worker.run(&who, worker.counter()).await.unwrap();
    let (_, nonce) = worker.count(&who);
    for (mode, count) in [(Mode::Stop, 2), (Mode::KeepRunning, 3)] {
        let full = Full::mount(worker.dir.path().join("full"));
        let refused = worker.checkpoint(&who, &full.0, mode).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("disk is full"), "{refused}");
        assert_eq!(worker.status().await.phase(), Phase::Running);
        assert_eq!(worker.count(&who), (count, nonce.clone()));
    }
    // And the next one is whole.
    let image = worker.dir.path().join("image");
    let saved = worker.checkpoint(&who, &image, Mode::Stop).await.unwrap();
    let who = worker.assignment("alice", 2);
    worker.restore(&who, worker.counter(), &image, &saved.compatibility.unwrap()).await.unwrap();
    assert_eq!(worker.count(&who), (4, nonce));
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}

#[tokio::test]
async fn a_stop_waits_for_requests_and_then_cuts_them() {
    let mut worker = Worker::start("drain").await;
    let who = worker.assignment("alice", 1);
    worker.run(&who, worker.counter()).await.unwrap();
    let mut held = worker.dial(&who, 0).unwrap();
    let image = worker.dir.path().join("image");
    std::fs::create_dir_all(&image).unwrap();
    let request = CheckpointRequest {
        assignment: Some(who.clone()),
        directory: image.display().to_string(),
        mode: Mode::Stop.into(),
        only_if_idle: false,
        drain_ms: 300,
    };
    let before = Instant::now();
    worker.client.checkpoint(request).await.unwrap();
    assert!(before.elapsed() >= Duration::from_millis(300), "it did not wait");
    // Cut: the router learns of it at once.
    held.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(!matches!(held.read(&mut [0]), Ok(1..)));
    worker.shutdown().await;
}

#[tokio::test]
async fn a_start_can_be_ended_midway() {
    let mut worker = Worker::start("midway").await;
    worker.wait_prepared().await;
    let who = worker.assignment("alice", 1);
    let mut spec = worker.counter();
    // Never ready.
    spec.containers[0].readiness.as_mut().unwrap().http_get.as_mut().unwrap().port = 9999;
    let mut second = worker.client.clone();
    let request =
        RunRequest { assignment: Some(who.clone()), spec: Some(spec), lease_deadline_ns: boottime_in(60.0) };
    let starting = tokio::spawn(async move { second.run(request).await });
    worker.wait_phase(Phase::Starting).await;
    worker.terminate(&who).await.unwrap();
    let ended = starting.await.unwrap().unwrap_err();
    assert_eq!(ended.code(), tonic::Code::Aborted, "{ended}");
    assert_eq!(worker.status().await.phase(), Phase::Empty);
    worker.shutdown().await;
}

#[tokio::test]
async fn roots_volumes_and_environments_are_as_asked() {
    let mut worker = Worker::start("mounts").await;
    let who = worker.assignment("alice", 1);
    let volume = worker.dir.path().join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    std::os::unix::fs::chown(&volume, Some(1000), Some(1000)).unwrap();
    let mut spec = worker.counter();
    let container = &mut spec.containers[0];
    container.read_only_root = true;
    container.mounts.push(Mount {
        source: volume.display().to_string(),
        destination: "/data/deep".into(),
        kind: "bind".into(),
        ..Mount::default()
    });
    container.mounts.push(Mount { destination: "/scratch".into(), kind: "tmpfs".into(), ..Mount::default() });
    worker.run(&who, spec).await.unwrap();
    let script = "echo kept > /data/deep/file && echo x > /scratch/x && echo written
        (echo no > /home/agent/x) 2>/dev/null || echo root is read-only
        (echo no > /run/ate/x) 2>/dev/null || echo ate is read-only
        cat /etc/resolv.conf | head -1; echo $PORT";
    let (code, out, err) = worker.exec(&who, sh(script), b"").await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(out, "written\nroot is read-only\nate is read-only\nnameserver 169.254.17.1\n8080\n", "{err}");
    assert_eq!(std::fs::read_to_string(volume.join("file")).unwrap(), "kept\n");
    assert!(!common::rootfs().join("data").exists(), "the shared root was written to");
    worker.terminate(&who).await.unwrap();
    worker.shutdown().await;
}
