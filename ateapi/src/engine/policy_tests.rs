// SPDX-License-Identifier: Apache-2.0
//! Quotas, eviction, nodes that are declared lost, and what a checkpoint may be answered with.
use std::time::Duration;

use substrate_proto::{ateom, types};
use tonic::Status;

use super::{CallError, Verb};
use crate::model::{ActorUid, Quota, State};
use crate::testing::Harness;

async fn limit(h: &Harness, quota: Quota) {
    h.engine.set_quota("space", quota).await.unwrap();
}

#[track_caller]
fn exceeded<T: std::fmt::Debug>(outcome: Result<T, CallError>) -> (&'static str, u64, u64) {
    match outcome {
        Err(CallError::Quota(it)) => (it.quota, it.used, it.limit),
        other => panic!("no quota stood in the way: {other:?}"),
    }
}

async fn try_create(h: &Harness, name: &str) -> Result<ActorUid, CallError> {
    let spec = types::ActorSpec { template: "t".into(), ..Default::default() };
    h.engine.create_actor("space", name, spec, None, false, None).await.map(|actor| actor.uid)
}

fn fork(name: &str) -> Verb {
    Verb::Fork { name: name.into(), snapshot: String::new() }
}

#[tokio::test(start_paused = true)]
async fn no_more_actors_than_the_quota_allows() {
    let h = Harness::new(&[2]).await;
    limit(&h, Quota { actors: 2, ..Quota::default() }).await;
    let alice = h.running("alice").await;
    h.suspend(&alice).await.unwrap();
    let bob = try_create(&h, "bob").await.unwrap();
    assert_eq!(exceeded(try_create(&h, "carol").await), ("actors", 2, 2));
    assert_eq!(exceeded(h.ask(&alice, fork("twin")).await), ("actors", 2, 2));
    h.delete(&bob).await.unwrap();
    h.ask(&alice, fork("twin")).await.unwrap();
    assert_eq!(h.engine.usage_of("space").await.unwrap().0.actors, 2);
}

#[tokio::test(start_paused = true)]
async fn no_more_actors_run_than_the_quota_allows() {
    let h = Harness::new(&[4]).await;
    limit(&h, Quota { running: 1, ..Quota::default() }).await;
    let alice = h.running("alice").await;
    let bob = h.create("bob").await;
    assert_eq!(exceeded(h.resume(&bob).await), ("running", 1, 1));
    assert_eq!(h.actor(&bob).await.reason, "QUOTA_EXCEEDED");
    h.suspend(&alice).await.unwrap();
    h.resume(&bob).await.unwrap();
    // A limit that is lowered ends nothing.
    limit(&h, Quota { running: 1, actors: 1, ..Quota::default() }).await;
    assert_eq!(h.actor(&bob).await.state, State::Running);
}

#[tokio::test(start_paused = true)]
async fn snapshots_that_lose_nothing_when_refused_are_refused_beyond_the_quota() {
    let h = Harness::new(&[2]).await;
    let uid = h.running("alice").await;
    // Each stores 40 bytes.
    h.checkpoint(&uid, true).await.unwrap();
    limit(&h, Quota { snapshot_bytes: 80, ..Quota::default() }).await;
    h.checkpoint(&uid, true).await.unwrap();
    assert_eq!(exceeded(h.checkpoint(&uid, true).await), ("snapshot_bytes", 80, 80));
    assert_eq!(exceeded(try_create(&h, "bob").await).0, "snapshot_bytes");
    h.suspend(&uid).await.unwrap();
    assert_eq!(exceeded(h.ask(&uid, fork("twin")).await).0, "snapshot_bytes");
    h.delete(&uid).await.unwrap();
    let (used, running) = h.engine.usage_of("space").await.unwrap();
    assert_eq!((used.actors, used.bytes, running), (0, 0, 0));
    try_create(&h, "bob").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn wake_ups_beyond_the_rate_are_told_when_to_come_again() {
    let mut h = Harness::new(&[4]).await;
    limit(&h, Quota { wakeups_per_s: 2, ..Quota::default() }).await;
    // Limits are there after a start, too.
    h.restart().await;
    h.engine.pause(Duration::from_secs(1)).await;
    h.running("a").await;
    h.running("b").await;
    let c = h.create("c").await;
    let error = h.resume(&c).await.unwrap_err();
    let again = error.retry_after().unwrap();
    assert!(again > Duration::ZERO && again <= Duration::from_millis(500), "{again:?}");
    assert_eq!(exceeded::<()>(Err(error)), ("wakeups_per_s", 2, 2));
    h.engine.pause(again).await;
    h.resume(&c).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_pool_evicts_the_next_one_when_the_longest_idle_is_busy_after_all() {
    let h = Harness::new(&[2]).await;
    let alice = h.running("alice").await;
    let bob = h.running("bob").await;
    let quiet = |second: i64| ateom::Stats { at_ns: (100 + second) * 1_000_000_000, ..Default::default() };
    for second in 0..10 {
        h.nodes[0].stats(alice.as_str(), quiet(second));
        if second > 2 {
            h.nodes[0].stats(bob.as_str(), quiet(second));
        }
    }
    h.engine.pause(Duration::from_secs(1)).await;
    h.nodes[0].fail("checkpoint", Status::failed_precondition("a connection is open"));
    let carol = h.create("carol").await;
    h.resume(&carol).await.unwrap();
    assert_eq!(h.until_state(&bob, State::Suspended).await.suspended_by, "evict");
    assert_eq!(h.actor(&alice).await.state, State::Running);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_declared_lost_gives_its_actors_back() {
    let h = Harness::new(&[2, 1]).await;
    let alice = h.running("alice").await;
    let bob = h.running("bob").await;
    h.checkpoint(&alice, true).await.unwrap();
    let durable = h.actor(&alice).await.last.unwrap();
    for uid in [&alice, &bob] {
        assert_eq!(h.host(uid).name, "n0");
        h.pause(uid).await.unwrap();
    }
    let node = "n0".into();
    let connected = h.engine.declare_node_lost(&node).await.unwrap_err();
    assert!(matches!(connected, CallError::Precondition { reason: "NODE_CONNECTED", .. }), "{connected}");
    h.nodes[0].go_down();
    h.engine.pause(Duration::from_secs(1)).await;
    assert_eq!(h.engine.declare_node_lost(&node).await.unwrap(), (0, 2));
    let actor = h.actor(&alice).await;
    assert_eq!((actor.state, actor.last), (State::Suspended, Some(durable)));
    assert_eq!(h.actor(&bob).await.state, State::Crashed);
    assert_eq!(h.events("RolledBack").await.len(), 1);
    assert_eq!(h.events("NodeDeclaredLost").await.len(), 1);
    // A verb leads on, elsewhere.
    h.resume(&alice).await.unwrap();
    assert_eq!(h.host(&alice).name, "n1");
    // Again is the same.
    assert_eq!(h.engine.declare_node_lost(&node).await.unwrap(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_lease_may_run_is_not_declared_lost() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].go_down();
    h.engine.pause(Duration::from_secs(1)).await;
    let error = h.engine.declare_node_lost(&"n0".into()).await.unwrap_err();
    let CallError::LeaseRuns { left, .. } = error else { panic!("{error}") };
    assert_eq!(h.actor(&uid).await.state, State::Running);
    h.engine.pause(left + Duration::from_secs(1)).await;
    h.engine.declare_node_lost(&"n0".into()).await.unwrap();
    assert_eq!(h.actor(&uid).await.state, State::Crashed);
    assert_eq!(h.copies(&uid), 0);
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_that_failed_is_not_answered_with_the_one_before() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.checkpoint(&uid, true).await.unwrap();
    h.nodes[0].work(uid.as_str());
    h.nodes[0].fail("checkpoint", Status::failed_precondition("the disk is full"));
    let error = h.checkpoint(&uid, true).await.unwrap_err();
    assert!(error.to_string().contains("the disk is full"), "{error}");
    assert_eq!(h.actor(&uid).await.state, State::Running);
}

#[tokio::test(start_paused = true)]
async fn what_a_lost_generation_did_is_not_answered_as_kept() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.checkpoint(&uid, true).await.unwrap();
    h.nodes[0].work(uid.as_str());
    h.nodes[0].kill_worker_of(uid.as_str());
    h.until_state(&uid, State::Suspended).await;
    let verb = |generation| Verb::Checkpoint { durable: true, generation, max_heap: 0 };
    let error = h.ask(&uid, verb(1)).await.unwrap_err();
    assert!(matches!(error, CallError::StaleGeneration { .. }), "{error}");
    // A stop keeps all of it, and so answers.
    h.resume(&uid).await.unwrap();
    h.suspend(&uid).await.unwrap();
    h.ask(&uid, verb(2)).await.unwrap();
}
