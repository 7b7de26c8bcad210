// SPDX-License-Identifier: Apache-2.0
//! The engine over stub nodes, on a paused clock.
use std::time::Duration;

use futures::future::join_all;
use substrate_proto::{ateom, types};
use tonic::Status;

use super::{CallError, Update, Verb};
use crate::model::{Snapshot, State, Stored as _};
use crate::schedule::NoWorker;
use crate::store::Store as _;
use crate::testing::Harness;

pub(super) async fn wait(harness: &Harness, seconds: u64) {
    harness.engine.pause(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn a_whole_life() {
    let h = Harness::new(&[2]).await;
    let uid = h.create("alice").await;
    assert_eq!(h.actor(&uid).await.state, State::New);
    let answer = h.resume(&uid).await.unwrap();
    assert_eq!(answer.actor.state, State::Running);
    assert!(answer.actor.ingress_endpoint.starts_with("unix:/n0-w"));
    assert!(h.resume(&uid).await.unwrap().was_running);
    h.nodes[0].work(uid.as_str());
    h.nodes[0].work(uid.as_str());

    let answer = h.suspend(&uid).await.unwrap();
    assert_eq!(answer.actor.state, State::Suspended);
    let snapshot = answer.snapshot.unwrap();
    assert!(snapshot.is_durable());
    assert_eq!(h.copies(&uid), 0);
    // Asked again: the same answer.
    assert_eq!(h.suspend(&uid).await.unwrap().snapshot.unwrap().id, snapshot.id);

    assert_eq!(h.resume(&uid).await.unwrap().actor.generation.0, 2);
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 2);
    let paused = h.pause(&uid).await.unwrap();
    assert_eq!(paused.actor.state, State::Paused);
    assert!(!paused.snapshot.unwrap().is_durable());
    let promoted = h.ask(&uid, Verb::Promote).await.unwrap();
    assert_eq!(promoted.actor.state, State::Suspended);

    h.resume(&uid).await.unwrap();
    h.nodes[0].work(uid.as_str());
    let reverted = h.suspend(&uid).await.unwrap();
    assert_eq!(reverted.actor.snapshots.len(), 2);
    let oldest = reverted.actor.snapshots[0].id.clone();
    h.ask(&uid, Verb::Revert { snapshot: oldest.0 }).await.unwrap();
    h.resume(&uid).await.unwrap();
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 2);
    h.suspend(&uid).await.unwrap();
    h.ask(&uid, Verb::Reset).await.unwrap();
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 0);

    h.delete(&uid).await.unwrap();
    assert!(h.find(&uid).await.is_none());
    assert!(h.blobs.manifests().is_empty());
    assert_eq!(h.nodes[0].purged(), std::slice::from_ref(&uid.0));
    assert!(matches!(h.delete(&uid).await, Err(CallError::NotFound { .. })));
    assert_eq!(h.engine.drivers(), 0);
}

#[tokio::test(start_paused = true)]
async fn resumes_share_one_activation() {
    let h = Harness::new(&[4]).await;
    let uid = h.create("alice").await;
    let answers = join_all((0..20).map(|_| h.resume(&uid))).await;
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap().actor.generation.0 == 1));
    assert_eq!(h.nodes[0].calls("activate"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_resume_right_after_a_suspend_does_not_wait_for_the_store() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].work(uid.as_str());
    h.nodes[0].hold("upload");
    let engine = std::sync::Arc::clone(&h.engine);
    let asked = uid.clone();
    let suspend = tokio::spawn(async move {
        engine.ask(&asked, Verb::Suspend { by: "user".into(), only_if_idle: false, drain_ms: 0 }, None).await
    });
    h.nodes[0].called("upload", 0).await;
    assert_eq!(h.actor(&uid).await.state, State::Suspending);
    let answer = h.resume(&uid).await.unwrap();
    assert_eq!(answer.actor.state, State::Running);
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 1);
    // The suspend is answered with what it made, as durable as it is.
    assert!(!suspend.await.unwrap().unwrap().snapshot.unwrap().is_durable());
    h.nodes[0].let_go("upload");
    let actor = h.until(&uid, |actor| actor.snapshots.iter().all(Snapshot::is_durable)).await;
    assert_eq!(actor.state, State::Running);
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_store_pauses_and_uploads_later() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    for _ in 0..4 {
        h.nodes[0].fail("upload", Status::resource_exhausted("the disk is full"));
    }
    let answer = h.suspend(&uid).await.unwrap();
    assert_eq!((answer.actor.state, answer.actor.reason.as_str()), (State::Paused, "UPLOAD_FAILED"));
    assert!(!answer.snapshot.unwrap().is_durable());
    assert_eq!(h.nodes[0].calls("drop_snapshot"), 0);
    let actor = h.until_state(&uid, State::Suspended).await;
    assert!(actor.last_snapshot().unwrap().is_durable());
    assert_eq!(h.events("UploadFailed").await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_full_pool_is_refused_and_nothing_is_lost() {
    let h = Harness::new(&[1]).await;
    let alice = h.running("alice").await;
    let bob = h.create("bob").await;
    let error = h.resume(&bob).await.unwrap_err();
    assert!(matches!(error, CallError::NoWorker(NoWorker::Full { .. })), "{error}");
    let actor = h.actor(&bob).await;
    assert_eq!((actor.state, actor.reason.as_str()), (State::New, "WORKER_POOL_FULL"));
    assert_eq!(h.copies(&alice), 1);
    h.suspend(&alice).await.unwrap();
    h.resume(&bob).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_pool_evicts_the_longest_idle() {
    let h = Harness::new(&[2]).await;
    let alice = h.running("alice").await;
    let bob = h.running("bob").await;
    for second in 0..10_i64 {
        let at_ns = (100 + second) * 1_000_000_000;
        let quiet = ateom::Stats { at_ns, ..Default::default() };
        h.nodes[0].stats(alice.as_str(), quiet);
        h.nodes[0].stats(bob.as_str(), ateom::Stats { execs: 1, ..quiet });
    }
    wait(&h, 1).await;
    let carol = h.create("carol").await;
    h.resume(&carol).await.unwrap();
    let actor = h.until_state(&alice, State::Suspended).await;
    assert_eq!(actor.suspended_by, "evict");
    assert_eq!(h.actor(&bob).await.state, State::Running);
}

#[tokio::test(start_paused = true)]
async fn an_idle_actor_sleeps_and_costs_nothing() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    for second in 0..=60_i64 {
        let at_ns = (100 + second) * 1_000_000_000;
        h.nodes[0].stats(uid.as_str(), ateom::Stats { at_ns, memory_bytes: 7, ..Default::default() });
        if second == 30 {
            wait(&h, 1).await;
            assert_eq!(h.engine.counted(&uid), Some((7, 0)));
        }
    }
    let actor = h.until_state(&uid, State::Suspended).await;
    assert_eq!(actor.suspended_by, "idle");
    assert_eq!(h.engine.counted(&uid), None);
    wait(&h, 1).await;
    assert_eq!(h.engine.drivers(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_actor_that_turned_busy_is_not_stopped() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    let details =
        tonic_types::ErrorDetails::with_error_info("BUSY", "substrate", std::collections::HashMap::new());
    let busy = <Status as tonic_types::StatusExt>::with_error_details(
        tonic::Code::FailedPrecondition,
        "an exec runs",
        details,
    );
    h.nodes[0].fail("checkpoint", busy);
    let verb = Verb::Suspend { by: "idle".into(), only_if_idle: true, drain_ms: 0 };
    let error = h.ask(&uid, verb).await.unwrap_err();
    assert!(matches!(&error, CallError::NotStopped { reason, .. } if reason == "BUSY"), "{error}");
    let actor = h.actor(&uid).await;
    assert_eq!(actor.state, State::Running);
    assert!(!actor.ingress_endpoint.is_empty());
    h.suspend(&uid).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn pause_first_is_promoted_later() {
    let h = Harness::new(&[1]).await;
    h.template("p", |spec| {
        spec.idle = Some(types::IdlePolicy { suspend_after: "10s".into(), pause_first: "30s".into() });
    })
    .await;
    let uid = h.create_from("p", "alice").await;
    h.resume(&uid).await.unwrap();
    for second in 0..=10_i64 {
        let at_ns = (100 + second) * 1_000_000_000;
        h.nodes[0].stats(uid.as_str(), ateom::Stats { at_ns, ..Default::default() });
    }
    let paused = h.until_state(&uid, State::Paused).await;
    assert_eq!(paused.promote_at_ms - paused.state_since_ms, 30_000);
    wait(&h, 1).await;
    assert_eq!(h.engine.drivers(), 0);
    let actor = h.until_state(&uid, State::Suspended).await;
    assert!(actor.state_since_ms >= paused.promote_at_ms);
}

#[tokio::test(start_paused = true)]
async fn exits_are_recorded() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].exit(uid.as_str(), 3);
    let actor = h.until_state(&uid, State::Exited).await;
    assert_eq!(actor.exit.unwrap().code, 3);
    h.ask(&uid, Verb::Reset).await.unwrap();
    // One that ends before it is ready.
    h.suspend(&uid).await.unwrap();
    let details = tonic_types::ErrorDetails::with_error_info(
        "EXITED",
        "substrate",
        [("container", "main"), ("code", "7"), ("signal", "0")].map(|(k, v)| (k.to_owned(), v.to_owned())),
    );
    let status =
        <Status as tonic_types::StatusExt>::with_error_details(tonic::Code::Internal, "exited", details);
    h.nodes[0].fail("activate", status);
    assert!(h.ask(&uid, Verb::Reset).await.is_err());
    let actor = h.actor(&uid).await;
    assert_eq!((actor.state, actor.exit.unwrap().code), (State::Exited, 7));
}

#[tokio::test(start_paused = true)]
async fn a_boot_that_fails_says_why() {
    let h = Harness::new(&[1]).await;
    let uid = h.create("alice").await;
    h.nodes[0].fail("activate", Status::internal("no memory left"));
    assert!(matches!(h.resume(&uid).await, Err(CallError::Failed { state: State::New, .. })));
    assert_eq!(h.actor(&uid).await.message, "no memory left");
    h.nodes[0].fail("activate", Status::not_found("no such command"));
    assert!(matches!(h.resume(&uid).await, Err(CallError::Failed { state: State::Crashed, .. })));
    assert_eq!(h.nodes[0].calls("release"), 2);
    h.ask(&uid, Verb::Reset).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn corrupt_copies() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].work(uid.as_str());
    h.suspend(&uid).await.unwrap();
    // The node's copy is bad: the durable one is taken.
    h.nodes[0].fail("activate", Status::data_loss("pages.img: digest differs"));
    assert_eq!(h.resume(&uid).await.unwrap().actor.state, State::Running);
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 1);
    // Both are: nothing is silently taken instead, and verbs lead on.
    let snapshot = h.suspend(&uid).await.unwrap().snapshot.unwrap();
    for _ in 0..2 {
        h.nodes[0].fail("activate", Status::data_loss("pages.img: digest differs"));
    }
    assert!(h.resume(&uid).await.is_err());
    let actor = h.actor(&uid).await;
    assert_eq!((actor.state, actor.reason.as_str()), (State::Crashed, "SNAPSHOT_CORRUPT"));
    assert!(actor.message.contains(snapshot.id.as_str()) && actor.message.contains("pages.img"));
    let previous = actor.snapshots[0].id.0.clone();
    h.ask(&uid, Verb::Revert { snapshot: previous }).await.unwrap();
    h.resume(&uid).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn checkpoints_are_group_commits() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].hold("checkpoint");
    let call = |durable| {
        let (engine, uid) = (std::sync::Arc::clone(&h.engine), uid.clone());
        let clock = std::sync::Arc::clone(&h.clock);
        tokio::spawn(async move {
            let arrived = clock.now();
            let verb = Verb::Checkpoint { durable, generation: 1, max_heap: 0 };
            (arrived, engine.ask(&uid, verb, None).await.unwrap().snapshot.unwrap())
        })
    };
    let first = call(false);
    h.nodes[0].called("checkpoint", 0).await;
    let mut later = Vec::new();
    for i in 0..50 {
        later.push(call(i % 2 == 0));
        wait(&h, 1).await;
    }
    h.nodes[0].let_go("checkpoint");
    let (_, shared_by_none) = first.await.unwrap();
    let mut ids = std::collections::BTreeSet::new();
    for call in later {
        let (arrived, snapshot) = call.await.unwrap();
        let begun = h.nodes[0].checkpoints().into_iter().find(|(id, _)| *id == snapshot.id.0).unwrap().1;
        assert!(begun >= arrived, "a checkpoint served a call that came after it began");
        assert_ne!(snapshot.id, shared_by_none.id);
        ids.insert(snapshot.id);
    }
    assert_eq!(ids.len(), 1);
    assert_eq!(h.actor(&uid).await.state, State::Running);
}

#[tokio::test(start_paused = true)]
async fn checkpoint_bounds_and_generations() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    let stats = ateom::Stats { at_ns: 1, memory_bytes: 1_000, ..Default::default() };
    h.nodes[0].stats(uid.as_str(), stats);
    wait(&h, 1).await;
    let verb = Verb::Checkpoint { durable: false, generation: 0, max_heap: 999 };
    assert!(matches!(h.ask(&uid, verb).await, Err(CallError::TooLarge { memory: 1_000, .. })));
    let verb = Verb::Checkpoint { durable: false, generation: 9, max_heap: 0 };
    assert!(matches!(h.ask(&uid, verb).await, Err(CallError::StaleGeneration { .. })));
    // A reply of an earlier generation is in the snapshot that ended it.
    let ended = h.suspend(&uid).await.unwrap().snapshot.unwrap();
    h.resume(&uid).await.unwrap();
    let verb = Verb::Checkpoint { durable: true, generation: 1, max_heap: 0 };
    assert_eq!(h.ask(&uid, verb).await.unwrap().snapshot.unwrap().id, ended.id);
}

#[tokio::test(start_paused = true)]
async fn a_failed_checkpoint_of_a_running_actor_leaves_it_running_or_rolls_back() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].fail("checkpoint", Status::resource_exhausted("no space"));
    assert!(h.checkpoint(&uid, false).await.is_err());
    assert_eq!(h.actor(&uid).await.state, State::Running);
    let kept = h.checkpoint(&uid, false).await.unwrap().snapshot.unwrap();
    h.nodes[0].fail("checkpoint", Status::internal("the sandbox died"));
    h.nodes[0].fail("get_node", Status::internal("?"));
    assert!(h.checkpoint(&uid, false).await.is_err());
    let actor = h.actor(&uid).await;
    assert_eq!((actor.state, actor.last), (State::Paused, Some(kept.id)));
    assert_eq!(h.copies(&uid), 0);
}

#[tokio::test(start_paused = true)]
async fn background_checkpoints_and_retention() {
    let h = Harness::new(&[1]).await;
    h.template("c", |spec| {
        spec.checkpoint = Some(types::CheckpointPolicy { interval: "60s".into(), ..Default::default() });
        spec.retention = Some(types::RetentionPolicy { keep_last: 2 });
    })
    .await;
    let uid = h.create_from("c", "alice").await;
    h.resume(&uid).await.unwrap();
    h.until(&uid, |actor| actor.last_snapshot().is_some_and(Snapshot::is_durable)).await;
    let tag = Verb::Tag { snapshot: String::new(), tag: "first".into() };
    let tagged = h.ask(&uid, tag).await.unwrap().snapshot.unwrap();
    wait(&h, 600).await;
    let actor = h.actor(&uid).await;
    assert!(h.nodes[0].calls("checkpoint") >= 9);
    assert_eq!(actor.snapshots.len(), 3);
    assert!(actor.snapshot(&tagged.id).is_some());
    assert_eq!(h.blobs.manifests().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn forks_share_blobs_until_the_last_holder_is_gone() {
    let h = Harness::new(&[2]).await;
    let uid = h.running("alice").await;
    h.nodes[0].work(uid.as_str());
    assert!(matches!(
        h.ask(&uid, Verb::Fork { name: "twin".into(), snapshot: String::new() }).await,
        Err(CallError::Refused(_))
    ));
    h.pause(&uid).await.unwrap();
    let fork = h.ask(&uid, Verb::Fork { name: "twin".into(), snapshot: String::new() }).await.unwrap().actor;
    assert_eq!(h.actor(&uid).await.state, State::Suspended);
    h.delete(&uid).await.unwrap();
    assert_eq!(h.blobs.manifests().len(), 1);
    h.resume(&fork.uid).await.unwrap();
    let copy = h.nodes[0].copy_of(fork.uid.as_str()).unwrap();
    assert_eq!((copy.memory, copy.clone), (1, true));
    assert_eq!(copy.identity["name"], b"twin");
    assert_eq!(copy.identity["clone"], b"true");
    h.delete(&fork.uid).await.unwrap();
    assert!(h.blobs.manifests().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_supervisors_identity_is_not_forked() {
    let h = Harness::new(&[1]).await;
    h.template("s", |spec| spec.holds_identity = true).await;
    let uid = h.create_from("s", "alice").await;
    h.resume(&uid).await.unwrap();
    h.suspend(&uid).await.unwrap();
    let error = h.ask(&uid, Verb::Fork { name: "b".into(), snapshot: String::new() }).await.unwrap_err();
    assert!(matches!(error, CallError::Precondition { reason: "HOLDS_IDENTITY", .. }));
}

#[tokio::test(start_paused = true)]
async fn delete_works_in_the_middle_of_everything() {
    for held in ["activate", "checkpoint", "release", "upload"] {
        let h = Harness::new(&[1]).await;
        let uid = h.create("alice").await;
        if held != "activate" {
            h.resume(&uid).await.unwrap();
        }
        let before = h.nodes[0].calls(held);
        h.nodes[0].hold(held);
        if held == "activate" {
            h.engine.ask_quietly(&uid, Verb::Resume { cause: "user".into() });
        } else {
            let verb = Verb::Suspend { by: "user".into(), only_if_idle: false, drain_ms: 0 };
            h.engine.ask_quietly(&uid, verb);
        }
        h.nodes[0].called(held, before).await;
        let (engine, asked) = (std::sync::Arc::clone(&h.engine), uid.clone());
        let delete = tokio::spawn(async move { engine.ask(&asked, Verb::Delete, None).await });
        let mut revisions = h.store.revisions();
        while h.find(&uid).await.is_some_and(|actor| actor.state != State::Deleting) {
            revisions.changed().await.unwrap();
        }
        h.nodes[0].let_go(held);
        delete.await.unwrap().unwrap();
        assert!(h.find(&uid).await.is_none(), "{held}");
        assert_eq!(h.copies(&uid), 0, "{held}");
        let other = h.create("bob").await;
        h.resume(&other).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn no_needless_checkpoint_before_a_delete() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.delete(&uid).await.unwrap();
    assert_eq!(h.nodes[0].calls("checkpoint"), 0);
}

#[tokio::test(start_paused = true)]
async fn draining_loses_nothing() {
    let h = Harness::new(&[2, 1]).await;
    let uid = h.running("alice").await;
    let host = std::sync::Arc::clone(h.host(&uid));
    host.work(uid.as_str());
    host.drain();
    let actor = h.until_state(&uid, State::Suspended).await;
    assert_eq!(actor.suspended_by, "drain");
    h.resume(&uid).await.unwrap();
    assert_ne!(h.host(&uid).name, host.name);
    assert_eq!(h.host(&uid).copy_of(uid.as_str()).unwrap().memory, 1);
    let (suspended, failed) = h.engine.suspend_all("shutdown").await.unwrap();
    assert_eq!((suspended, failed.len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn request_ids_find_the_first_attempt() {
    let h = Harness::new(&[1]).await;
    let key = |id: &str, print: &str| {
        Some(super::RequestKey { id: format!("m/{id}"), fingerprint: print.to_owned() })
    };
    let spec = types::ActorSpec { template: "t".into(), ..Default::default() };
    let create = |name: &'static str, print: &'static str| {
        h.engine.create_actor("space", name, spec.clone(), None, false, key("c", print))
    };
    let first = create("alice", "a").await.unwrap();
    assert_eq!(create("alice", "a").await.unwrap().uid, first.uid);
    assert!(matches!(create("alice", "b").await, Err(CallError::RequestReused(_))));
    let uid = first.uid;
    h.resume(&uid).await.unwrap();
    let suspend = || Verb::Suspend { by: "user".into(), only_if_idle: false, drain_ms: 0 };
    let first = h.engine.ask(&uid, suspend(), key("s", "s")).await.unwrap().snapshot.unwrap();
    h.resume(&uid).await.unwrap();
    // A late retry finds what the first led to and does not suspend again.
    let again = h.engine.ask(&uid, suspend(), key("s", "s")).await.unwrap().snapshot.unwrap();
    assert_eq!(again.id, first.id);
    assert_eq!(h.actor(&uid).await.state, State::Running);
    h.suspend(&uid).await.unwrap();
    let fork = || Verb::Fork { name: "twin".into(), snapshot: String::new() };
    let first = h.engine.ask(&uid, fork(), key("f", "f")).await.unwrap().actor.uid;
    assert_eq!(h.engine.ask(&uid, fork(), key("f", "f")).await.unwrap().actor.uid, first);
    let before = h.actor(&uid).await.generation;
    h.engine.ask(&uid, Verb::Reset, key("r", "r")).await.unwrap();
    h.engine.ask(&uid, Verb::Reset, key("r", "r")).await.unwrap();
    assert_eq!(h.actor(&uid).await.generation, before.next());
    // A late retry of a resume does not wake what was put to sleep since.
    h.suspend(&uid).await.unwrap();
    let resume = || Verb::Resume { cause: "user".into() };
    h.engine.ask(&uid, resume(), key("w", "w")).await.unwrap();
    assert!(h.engine.ask(&uid, resume(), key("w", "w")).await.unwrap().was_running);
    h.suspend(&uid).await.unwrap();
    h.engine.ask(&uid, resume(), key("w", "w")).await.unwrap();
    assert_eq!(h.actor(&uid).await.state, State::Suspended);
    // A late retry of an update or a tag does not undo what came after it.
    let label = |value: &str| {
        let labels = Some([("k".to_owned(), value.to_owned())].into());
        Verb::Update(Box::new(Update { labels, ..Update::default() }))
    };
    h.engine.ask(&uid, label("old"), key("u1", "u1")).await.unwrap();
    h.engine.ask(&uid, label("new"), key("u2", "u2")).await.unwrap();
    let again = h.engine.ask(&uid, label("old"), key("u1", "u1")).await.unwrap().actor;
    assert_eq!(again.spec.labels["k"], "new");
    let tag = || Verb::Tag { snapshot: String::new(), tag: "v1".into() };
    let tagged = h.engine.ask(&uid, tag(), key("t", "t")).await.unwrap().snapshot.unwrap();
    h.ask(&uid, Verb::Untag { tag: "v1".into() }).await.unwrap();
    let again = h.engine.ask(&uid, tag(), key("t", "t")).await.unwrap().snapshot.unwrap();
    assert_eq!((again.id, again.tags.len()), (tagged.id, 0));
}

#[tokio::test(start_paused = true)]
async fn secrets_reach_the_node_and_nothing_else() {
    let h = Harness::new(&[1]).await;
    let file = types::File { path: "/t".into(), mode: 0o400, content: b"hunter2".to_vec() };
    let spec = types::ActorSpec { template: "t".into(), files: vec![file.clone()], ..Default::default() };
    let actor = h.engine.create_actor("space", "alice", spec, None, false, None).await.unwrap();
    h.resume(&actor.uid).await.unwrap();
    assert_eq!(h.nodes[0].copy_of(actor.uid.as_str()).unwrap().files, [file]);
    let log = h.store.changes(0, 10_000).await.unwrap();
    let plain: Vec<u8> = b"hunter2".to_vec();
    let numbers = format!("{plain:?}").replace(' ', "");
    for change in log {
        assert!(!change.doc.contains("hunter2") && !change.doc.replace(' ', "").contains(&numbers));
    }
    assert!(h.actor(&actor.uid).await.object().doc.contains("/t"));
    h.delete(&actor.uid).await.unwrap();
    assert!(h.store.sealed(actor.uid.as_str()).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn egress_names_are_stable_and_stale_generations_refused() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    let egress = types::EgressPolicy {
        allow: vec![types::EgressRule { host: "api.example.com".into(), ..Default::default() }],
    };
    let bind = |generation, name: &str| Verb::Bind { generation, name: name.into() };
    assert!(matches!(h.ask(&uid, bind(1, "api.example.com")).await, Err(CallError::Name(_))));
    let update = Update { egress: Some(egress), ..Update::default() };
    let updated = h.ask(&uid, Verb::Update(Box::new(update))).await.unwrap().actor;
    assert_eq!(updated.egress_revision, 2);
    assert_eq!(h.nodes[0].calls("set_egress"), 1);
    let first = h.ask(&uid, bind(1, "api.example.com")).await.unwrap().name.unwrap();
    assert_eq!(first.ipv4, "198.18.0.1");
    h.suspend(&uid).await.unwrap();
    h.resume(&uid).await.unwrap();
    assert!(matches!(h.ask(&uid, bind(1, "api.example.com")).await, Err(CallError::StaleGeneration { .. })));
    assert_eq!(h.ask(&uid, bind(2, "api.example.com")).await.unwrap().name.unwrap(), first);
}

#[tokio::test(start_paused = true)]
async fn templates_are_pinned_idempotent_and_kept_while_used() {
    let h = Harness::new(&[1]).await;
    let uid = h.create("alice").await;
    let template: crate::model::Template =
        crate::store::find(&*h.store, "space", "t").await.unwrap().unwrap();
    assert!(template.spec.containers[0].image.contains("@sha256:"));
    assert_eq!(template.ports, [8080]);
    let pulls = h.nodes[0].calls("ensure_image");
    h.template("t", |_| {}).await;
    assert_eq!(h.nodes[0].calls("ensure_image"), pulls);
    let mut other = template.spec.clone();
    other.worker_pool = "big".into();
    let labels = std::collections::BTreeMap::new();
    let error = h.engine.create_template("space", "t", &other, labels, false).await.unwrap_err();
    assert!(matches!(error, CallError::Exists(_)));
    assert!(h.engine.delete_template("space", "t", None).await.is_err());
    assert!(h.engine.delete_atespace("space", None).await.is_err());
    h.delete(&uid).await.unwrap();
    assert!(h.engine.delete_template("space", "t", None).await.unwrap());
    assert!(h.engine.delete_atespace("space", None).await.unwrap());
    assert!(!h.engine.delete_atespace("space", None).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_image_is_refused_with_its_name() {
    let h = Harness::new(&[1]).await;
    h.nodes[0].fail("ensure_image", Status::not_found("no such layout"));
    let spec = types::TemplateSpec {
        containers: vec![types::Container {
            name: "main".into(),
            image: "oci:/nowhere".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let labels = std::collections::BTreeMap::new();
    let error = h.engine.create_template("space", "x", &spec, labels, false).await.unwrap_err();
    assert!(
        error.to_string().contains("oci:/nowhere") && error.to_string().contains("no such layout"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn too_many_waiting_calls_are_refused() {
    let h = Harness::new(&[1]).await;
    let uid = h.create("alice").await;
    h.nodes[0].hold("activate");
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let (engine, uid) = (std::sync::Arc::clone(&h.engine), uid.clone());
            tokio::spawn(async move { engine.ask(&uid, Verb::Resume { cause: "user".into() }, None).await })
        })
        .collect();
    h.nodes[0].called("activate", 0).await;
    wait(&h, 1).await;
    h.nodes[0].let_go("activate");
    let answers = join_all(calls).await;
    let (ok, refused): (Vec<_>, Vec<_>) = answers.into_iter().map(Result::unwrap).partition(Result::is_ok);
    assert!(!ok.is_empty() && !refused.is_empty());
    assert!(refused.iter().all(|it| matches!(it, Err(CallError::Overloaded(64)))));
}

#[tokio::test(start_paused = true)]
async fn traffic_wakes_only_what_allows_it() {
    let h = Harness::new(&[1]).await;
    let spec =
        types::ActorSpec { template: "t".into(), wake_on_traffic_disabled: true, ..Default::default() };
    let uid = h.engine.create_actor("space", "alice", spec, None, false, None).await.unwrap().uid;
    let traffic = || Verb::Resume { cause: "traffic".into() };
    assert!(matches!(h.ask(&uid, traffic()).await, Err(CallError::Precondition { .. })));
    h.resume(&uid).await.unwrap();
    assert!(h.ask(&uid, traffic()).await.unwrap().was_running);
}
