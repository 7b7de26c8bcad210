// SPDX-License-Identifier: Apache-2.0
//! The node agent over real worker processes that run no sandbox (`stub_ateom.rs`): what it promises about workers,
//! leases, activation and snapshots. Needs root for control groups and mounts.
mod gvisor;
mod machine;

use std::time::Duration;

use machine::{Machine, PATIENCE, SESSION, Session, assignment};
use nix::sys::signal::Signal;
use substrate_proto::atelet as api;
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::types::Assignment;
use tonic::Code;
use tonic_types::StatusExt as _;

fn checkpoint(assignment: &Assignment, id: &str, mode: Mode) -> api::CheckpointRequest {
    api::CheckpointRequest {
        assignment: Some(assignment.clone()),
        snapshot_id: id.into(),
        mode: mode as i32,
        ..api::CheckpointRequest::default()
    }
}

fn release(assignment: &Assignment) -> api::ReleaseRequest {
    api::ReleaseRequest { assignment: Some(assignment.clone()), session: SESSION.into() }
}

fn upload(snapshot: &api::NodeSnapshot) -> api::UploadRequest {
    api::UploadRequest {
        actor_uid: snapshot.actor_uid.clone(),
        atespace: "blue".into(),
        generation: snapshot.generation,
        snapshot_id: snapshot.snapshot_id.clone(),
        node_digest: snapshot.node_digest.clone(),
        parents: Vec::new(),
    }
}

fn source(snapshot: &api::NodeSnapshot, manifest: &str, node: &str) -> api::SnapshotSource {
    api::SnapshotSource {
        snapshot_id: snapshot.snapshot_id.clone(),
        actor_uid: snapshot.actor_uid.clone(),
        manifest_digest: manifest.into(),
        node_digest: node.into(),
        compatibility: snapshot.compatibility.clone(),
        generation: snapshot.generation,
    }
}

fn reason(status: &tonic::Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_actor_is_suspended_uploaded_and_comes_back_from_either_copy() {
    let Some(machine) = Machine::new(2) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(2).await;
    let first = assignment("u1", 1, "w1");
    node.session.name(&first);
    let started = node.client.activate(machine.activate(&first)).await.unwrap().into_inner();
    assert!(started.ingress_endpoint.ends_with("run/workers/w1/ingress.sock"), "{started:?}");
    // What the ateom was told: the image's entrypoint, the template's arguments, mounts with the content asked for.
    let spec: serde_json::Value =
        serde_json::from_slice(&std::fs::read(machine.knob("w1", "spec")).unwrap()).unwrap();
    assert_eq!(spec["args"], serde_json::json!(["/agent", "serve"]));
    let mounted = |at: usize| std::path::PathBuf::from(spec["mounts"][at].as_str().unwrap());
    assert_eq!(std::fs::read(mounted(0).join("name")).unwrap(), b"alice");
    assert_eq!(std::fs::read(mounted(1)).unwrap(), b"secret");
    assert_eq!(std::fs::read(format!("{}/agent", spec["rootfs"].as_str().unwrap())).unwrap(), b"bin");
    let nonce = node.nonce(&first).await;
    // A retry finds it.
    let again = node.client.activate(machine.activate(&first)).await.unwrap().into_inner();
    assert_eq!(again.ingress_endpoint, started.ingress_endpoint);
    assert_eq!(node.nonce(&first).await, nonce);

    let made = node.client.checkpoint(checkpoint(&first, "s1", Mode::Stop)).await.unwrap().into_inner();
    let snapshot = made.snapshot.unwrap();
    assert_eq!((snapshot.generation, snapshot.memory_bytes), (1, 100_000));
    assert!(!mounted(1).exists(), "secrets of a suspended actor stay behind");
    let again = node.client.checkpoint(checkpoint(&first, "s1", Mode::Stop)).await.unwrap().into_inner();
    assert_eq!(again.snapshot.as_ref(), Some(&snapshot));
    node.client.release(release(&first)).await.unwrap();
    // What has ended does not come back by a late retry.
    let error = node.client.activate(machine.activate(&first)).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::Aborted, "GENERATION_ENDED"));

    let uploaded = node.client.upload(upload(&snapshot)).await.unwrap().into_inner();
    let again = node.client.upload(upload(&snapshot)).await.unwrap().into_inner();
    assert_eq!((&again.manifest_digest, again.stored_bytes), (&uploaded.manifest_digest, 0));

    // From this node, on another worker.
    let second = assignment("u1", 2, "w2");
    node.session.name(&second);
    let mut request = machine.activate(&second);
    request.snapshot = Some(source(&snapshot, "", &snapshot.node_digest));
    let restored = node.client.activate(request).await.unwrap().into_inner();
    assert_eq!(restored.restored_from, "node");
    assert_eq!(node.nonce(&second).await, nonce);
    // The old generation may do nothing any more.
    let error = node.client.checkpoint(checkpoint(&first, "s9", Mode::Stop)).await.unwrap_err();
    assert_eq!(error.code(), Code::Aborted);
    node.client.release(release(&second)).await.unwrap();

    // The copy on this node is damaged: the durable one is taken.
    let pages = machine.config.dir.join("snapshots/u1/s1/files/pages.img");
    let mut content = std::fs::read(&pages).unwrap();
    content[4 << 20] ^= 1;
    std::fs::write(&pages, &content).unwrap();
    let third = assignment("u1", 3, "w1");
    node.session.name(&third);
    let mut request = machine.activate(&third);
    request.snapshot = Some(source(&snapshot, "", &snapshot.node_digest));
    let error = node.client.activate(request.clone()).await.unwrap_err();
    let info = error.get_details_error_info().unwrap();
    assert_eq!((error.code(), info.metadata["file"].as_str()), (Code::DataLoss, "pages.img"));
    assert_eq!(info.metadata["source"], "node");
    request.snapshot = Some(source(&snapshot, &uploaded.manifest_digest, &snapshot.node_digest));
    let restored = node.client.activate(request).await.unwrap().into_inner();
    assert_eq!(restored.restored_from, "durable");
    assert_eq!(node.nonce(&third).await, nonce);

    // Everything of it goes.
    node.client
        .purge(api::PurgeRequest {
            actor_uid: "u1".into(),
            atespace: "blue".into(),
            actor_name: "alice".into(),
        })
        .await
        .unwrap();
    for dir in ["node/snapshots", "node/actors", "run/actors", "logs/actors"] {
        let left: Vec<_> = std::fs::read_dir(machine.dir.path().join(dir)).unwrap().flatten().collect();
        assert!(left.is_empty(), "{dir}: {left:?}");
    }
    assert!(!machine.group().child("w1").child("actor-1").is_populated().unwrap());
    node.client
        .delete_blobs(api::DeleteBlobsRequest {
            actor_uid: "u1".into(),
            manifests: vec!["1-s1".into()],
            packs: uploaded.packs,
        })
        .await
        .unwrap();
    assert_eq!(std::fs::read_dir(machine.dir.path().join("blobs")).unwrap().count(), 0);
    node.stop().await;
    atelet::stop_workers(&machine.config).await.unwrap();
    assert!(!machine.group().is_populated().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_outlive_the_agent_and_are_adopted() {
    let Some(machine) = Machine::new(2) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(2).await;
    let first = assignment("u1", 1, "w1");
    node.session.name(&first);
    node.client.activate(machine.activate(&first)).await.unwrap();
    let (nonce, pids) = (node.nonce(&first).await, (machine.pid("w1"), machine.pid("w2")));
    // Another agent on the same directory is refused while this one runs.
    let (ready, _) = tokio::sync::oneshot::channel();
    let second =
        Box::pin(atelet::serve(machine.config.clone(), ready, tokio_util::sync::CancellationToken::new()))
            .await;
    assert!(matches!(second, Err(atelet::Error::Locked(_))), "{second:?}");
    node.stop().await;
    let error = atelet::stop_workers(&machine.config).await.unwrap_err().to_string();
    assert!(error.contains("w1") && error.contains("suspend or delete"), "{error}");

    // One that is slow to answer is not told of as if it held nothing.
    signal(pids.0, Signal::SIGSTOP);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(700)).await;
        signal(pids.0, Signal::SIGCONT);
    });
    let mut node = machine.start(&[&first]).await;
    let told = node.session.all_up(2).await;
    let adopted = &told.synced.unwrap()["w1"];
    assert!(adopted.alive, "{adopted:?}");
    assert_eq!(adopted.slot.as_ref().unwrap().phase(), Phase::Running);
    assert_eq!(machine.pid("w1"), pids.0);
    assert_ne!(machine.pid("w2"), pids.1, "w2 was ended and must have been started anew");
    assert_eq!(node.nonce(&first).await, nonce);
    assert!(told.lost.is_empty());
    // The lease is handed on to what was adopted.
    node.session.until("a grant", |told| told.grants > 0).await;
    wait_for(|| {
        std::fs::read_to_string(machine.knob("w1", "leases")).is_ok_and(|text| text.contains("u1 1 "))
    })
    .await;
    node.stop().await;
}

fn signal(pid: i32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}

async fn wait_for(mut condition: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    waited.await.expect("it never happened");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_worker_is_fenced_told_and_started_again() {
    let Some(machine) = Machine::new(1) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(1).await;
    let first = assignment("u1", 1, "w1");
    node.session.name(&first);
    node.client.activate(machine.activate(&first)).await.unwrap();
    let actors = machine.group().child("w1").child("actor-1");
    assert!(actors.is_populated().unwrap());
    let old = machine.pid("w1");
    signal(old, Signal::SIGKILL);
    let told = node.session.until("the loss", |told| !told.lost.is_empty()).await;
    // Its sleep outlived its ateom; it must be gone before the loss is told.
    assert!(!actors.is_populated().unwrap(), "told before it was fenced");
    assert_eq!(told.lost[0].assignment.as_ref(), Some(&first));
    assert!(told.lost[0].reason.contains("signal: 9"), "{}", told.lost[0].reason);
    node.session
        .until("a new worker", |told| told.workers["w1"].alive && told.workers["w1"].slot.is_some())
        .await;
    assert_ne!(machine.pid("w1"), old);
    let error = node.client.activate(machine.activate(&first)).await.unwrap_err();
    assert_eq!(error.code(), Code::Aborted, "a lost generation came back: {error}");
    // A session that begins later is told too; the one before ends.
    let later = Session::open(node.client.clone(), &[]).await;
    later.until("the loss, again", |told| told.lost.len() == 1).await;
    node.session.until("the end of the first session", |told| told.ended).await;
    let second = assignment("u1", 2, "w1");
    later.name(&second);
    node.client.activate(machine.activate(&second)).await.unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_died_while_nobody_watched_is_fenced_and_told() {
    let Some(machine) = Machine::new(1) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(1).await;
    let first = assignment("u1", 1, "w1");
    node.session.name(&first);
    node.client.activate(machine.activate(&first)).await.unwrap();
    let pid = machine.pid("w1");
    node.stop().await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let actors = machine.group().child("w1").child("actor-1");
    assert!(actors.is_populated().unwrap());
    let node = machine.start(&[]).await;
    node.session.all_up(1).await;
    assert!(!actors.is_populated().unwrap(), "what a dead worker left still runs");
    let told = node.session.until("the loss", |told| !told.lost.is_empty()).await;
    assert_eq!(told.lost[0].assignment.as_ref(), Some(&first));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lease_does_not_name_is_ended_and_without_one_nothing_starts() {
    let Some(machine) = Machine::new(2) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(2).await;
    let (kept, past) = (assignment("u1", 1, "w1"), assignment("u2", 1, "w2"));
    node.session.name(&kept);
    node.session.name(&past);
    node.client.activate(machine.activate(&kept)).await.unwrap();
    let mut request = machine.activate(&past);
    request.assignment.as_mut().unwrap().actor_name = "bob".into();
    let past = request.assignment.clone().unwrap();
    node.client.activate(request).await.unwrap();
    // Sent in a session that is over, and late: this node may have been given up meanwhile (P1).
    let stray = assignment("u4", 1, "w2");
    let late = api::ActivateRequest { session: "yesterday's".into(), ..machine.activate(&stray) };
    let error = node.client.activate(late).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::Unavailable, "OTHER_SESSION"));
    let late = api::ReleaseRequest { session: "yesterday's".into(), ..release(&past) };
    let error = node.client.release(late).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::Unavailable, "OTHER_SESSION"));
    // A new session asks at once; only one actor is named.
    let later = Session::open(node.client.clone(), &[&kept]).await;
    later
        .until("the end of what is not named", |told| {
            told.workers["w2"].slot.as_ref().is_some_and(|slot| slot.phase() == Phase::Empty)
        })
        .await;
    assert!(!node.nonce(&kept).await.is_empty());
    let error = node.exec(&past, &["nonce"]).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    node.stop().await;

    // A control plane that grants nothing.
    let mut node = machine.start(&[]).await;
    node.session.all_up(2).await;
    *node.session.granting.lock().unwrap() = false;
    let next = assignment("u3", 1, "w2");
    // The first grant of this session may have been given already: it covers 60 s, more is asked for.
    let mut request = machine.activate(&next);
    request.lease_term_ms = 0;
    let error = node.client.activate(request).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::Unavailable, "NO_LEASE"));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_or_released_start_leaves_nothing() {
    let Some(machine) = Machine::new(1) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(1).await;
    let first = assignment("u1", 1, "w1");
    node.session.name(&first);
    std::fs::write(machine.knob("w1", "run-fails"), b"").unwrap();
    let error = node.client.activate(machine.activate(&first)).await.unwrap_err();
    assert!(error.message().contains("w1") && error.message().contains("does not start"), "{error}");
    assert!(!machine.group().child("w1").child("actor-1").is_populated().unwrap());
    std::fs::remove_file(machine.knob("w1", "run-fails")).unwrap();

    // Released while it starts.
    std::fs::write(machine.knob("w1", "run-hangs"), b"").unwrap();
    let mut client = node.client.clone();
    let request = machine.activate(&first);
    let starting = tokio::spawn(async move { client.activate(request).await });
    let actors = machine.group().child("w1").child("actor-1");
    wait_for(|| actors.is_populated().unwrap()).await;
    node.client.release(release(&first)).await.unwrap();
    assert!(!actors.is_populated().unwrap(), "released, but it runs");
    assert_eq!(starting.await.unwrap().unwrap_err().code(), Code::Aborted);
    std::fs::remove_file(machine.knob("w1", "run-hangs")).unwrap();

    // Killed while it starts.
    let second = assignment("u1", 2, "w1");
    node.session.name(&second);
    std::fs::write(machine.knob("w1", "run-hangs"), b"").unwrap();
    let mut client = node.client.clone();
    let request = machine.activate(&second);
    let starting = tokio::spawn(async move { client.activate(request).await });
    wait_for(|| actors.is_populated().unwrap()).await;
    let pid = nix::unistd::Pid::from_raw(machine.pid("w1"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let error = starting.await.unwrap().unwrap_err();
    assert!(!actors.is_populated().unwrap(), "answered before it was fenced");
    assert!(error.message().contains("lost"), "{error}");
    std::fs::remove_file(machine.knob("w1", "run-hangs")).unwrap();

    // Wrong requests say what is wrong.
    node.session.all_up(1).await;
    let third = assignment("u1", 3, "w1");
    node.session.name(&third);
    let mut request = machine.activate(&third);
    request.template.as_mut().unwrap().containers[0].image = "oci:/no/such/layout".into();
    let error = node.client.activate(request).await.unwrap_err();
    assert!(error.message().contains("main") && error.message().contains("/no/such/layout"), "{error}");
    let error = node.client.activate(machine.activate(&assignment("u9", 1, "w7"))).await.unwrap_err();
    assert!(error.message().contains("no worker w7 (it has: w1)"), "{error}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_told_and_its_slot_taken_by_the_next() {
    let Some(machine) = Machine::new(1) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(1).await;
    let first = assignment("u1", 1, "w1");
    node.session.name(&first);
    node.client.activate(machine.activate(&first)).await.unwrap();
    node.exec(&first, &["exit", "3"]).await.unwrap();
    let told = node.session.until("the exit", |told| !told.exited.is_empty()).await;
    assert_eq!(told.exited[0].assignment.as_ref(), Some(&first));
    assert_eq!(told.exited[0].exit.as_ref().unwrap().code, 3);
    // Nobody released it; a later session hears of it too.
    let later = Session::open(node.client.clone(), &[]).await;
    later.until("the exit, again", |told| told.exited.len() == 1).await;
    let mut request = machine.activate(&assignment("u2", 1, "w1"));
    request.assignment.as_mut().unwrap().actor_name = "bob".into();
    later.name(request.assignment.as_ref().unwrap());
    node.client.activate(request.clone()).await.unwrap();
    // A slot that runs is not taken.
    let error = node.client.activate(machine.activate(&assignment("u3", 1, "w1"))).await.unwrap_err();
    assert!(reason(&error) == "SLOT_BUSY" && error.message().contains("blue/bob"), "{error}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_checkpoint_leaves_the_actor_running() {
    let Some(mut machine) = Machine::new(1) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(1).await;
    let first = assignment("u1", 1, "w1");
    node.session.name(&first);
    node.client.activate(machine.activate(&first)).await.unwrap();
    std::fs::write(machine.knob("w1", "checkpoint-refused"), b"").unwrap();
    let error = node.client.checkpoint(checkpoint(&first, "s1", Mode::Stop)).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::FailedPrecondition, "BUSY"));
    std::fs::remove_file(machine.knob("w1", "checkpoint-refused")).unwrap();
    let nonce = node.nonce(&first).await;
    // A duplicate that comes late finds it idle, and ends nothing: its refusal was believed.
    let error = node.client.checkpoint(checkpoint(&first, "s1", Mode::Stop)).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::FailedPrecondition, "BUSY"));
    assert_eq!(node.nonce(&first).await, nonce);
    let left: Vec<_> =
        std::fs::read_dir(machine.config.dir.join("snapshots/u1")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    // One that keeps it running.
    let made =
        node.client.checkpoint(checkpoint(&first, "s2", Mode::KeepRunning)).await.unwrap().into_inner();
    assert_eq!(node.nonce(&first).await, nonce);
    let list = node
        .client
        .list_snapshots(api::ListSnapshotsRequest { actor_uid: "u1".into() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(list.snapshots, [made.snapshot.unwrap()]);
    node.stop().await;
    // With the disk nearly full nothing is begun.
    machine.config.min_free_bytes = u64::MAX / 2;
    let mut node = machine.start(&[&first]).await;
    node.session.all_up(1).await;
    let error = node.client.checkpoint(checkpoint(&first, "s3", Mode::Stop)).await.unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("delete actors"), "{error}");
    assert_eq!(node.nonce(&first).await, nonce);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_survives_the_end_of_the_agent() {
    let Some(machine) = Machine::new(1) else { return };
    for (round, before_the_answer) in [(1, true), (2, false)] {
        let mut node = machine.start(&[]).await;
        node.session.all_up(1).await;
        let uid = format!("u{round}");
        let own = assignment(&uid, 1, "w1");
        node.session.name(&own);
        node.client.activate(machine.activate(&own)).await.unwrap();
        let nonce = node.nonce(&own).await;
        std::fs::write(machine.knob("w1", "checkpoint-hangs"), b"").unwrap();
        let mut client = node.client.clone();
        let request = checkpoint(&own, "s1", Mode::Stop);
        let pending = tokio::spawn(async move { client.checkpoint(request).await });
        let written = || {
            let staged =
                std::fs::read_dir(machine.config.dir.join("snapshots").join(&uid)).into_iter().flatten();
            staged.flatten().any(|staged| staged.path().join("files/pages.img").exists())
        };
        wait_for(written).await;
        pending.abort();
        node.kill();
        if !before_the_answer {
            // The ateom ends its checkpoint while there is no agent.
            std::fs::remove_file(machine.knob("w1", "checkpoint-hangs")).unwrap();
            let actors = machine.group().child("w1").child("actor-1");
            wait_for(|| !actors.is_populated().unwrap()).await;
        }
        let mut node = machine.start(&[&own]).await;
        node.session.all_up(1).await;
        let mut client = node.client.clone();
        let request = checkpoint(&own, "s1", Mode::Stop);
        let pending = tokio::spawn(async move { client.checkpoint(request).await });
        if before_the_answer {
            wait_for(|| machine.knob("w1", "checkpoint-hangs").exists()).await;
            std::fs::remove_file(machine.knob("w1", "checkpoint-hangs")).unwrap();
        }
        let made = pending.await.unwrap().unwrap().into_inner().snapshot.unwrap();
        let next = assignment(&uid, 2, "w1");
        node.session.name(&next);
        let mut request = machine.activate(&next);
        request.snapshot = Some(source(&made, "", &made.node_digest));
        node.client.activate(request).await.unwrap();
        assert_eq!(node.nonce(&next).await, nonce, "round {round}");
        node.client.release(release(&next)).await.unwrap();
        node.stop().await;
    }
}

/// P1, P4: a loss is reported with what the status shows, so nothing counts as started before the status shows it.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_between_its_answer_and_its_status_fails_the_start() {
    let Some(machine) = Machine::new(1) else { return };
    let mut node = machine.start(&[]).await;
    node.session.all_up(1).await;
    std::fs::write(machine.knob("w1", "dies-unseen"), b"").unwrap();
    let own = assignment("u1", 1, "w1");
    node.session.name(&own);
    let error = node.client.activate(machine.activate(&own)).await.unwrap_err();
    assert_eq!((error.code(), reason(&error).as_str()), (Code::Internal, "WORKER_LOST"), "{error}");
    assert!(error.message().contains("exit status: 1"), "{error}");
    // Another attempt finds a worker that serves.
    std::fs::remove_file(machine.knob("w1", "dies-unseen")).unwrap();
    let next = assignment("u1", 2, "w1");
    node.session.name(&next);
    node.client.activate(machine.activate(&next)).await.unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_start_says_why_and_holds_nobody_up() {
    let Some(mut machine) = Machine::new(1) else { return };
    let program = machine.dir.path().join("broken-ateom");
    std::fs::write(&program, "#!/bin/sh\necho no runsc at /opt/runsc: install it\nexit 3\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    machine.config.ateom_binary = program;
    let mut node = machine.start(&[]).await;
    let told = node.session.until("the loss", |told| !told.lost.is_empty()).await;
    assert_eq!(told.lost[0].assignment, None);
    for words in ["exit status: 3", "no runsc at /opt/runsc: install it"] {
        assert!(told.lost[0].reason.contains(words), "{}", told.lost[0].reason);
    }
    let first = assignment("u1", 1, "w1");
    let error = node.client.activate(machine.activate(&first)).await.unwrap_err();
    assert!(error.code() == Code::Internal && error.message().contains("install it"), "{error}");
    // Nothing of it can be there.
    node.client.release(release(&first)).await.unwrap();
    node.stop().await;
}
