// SPDX-License-Identifier: Apache-2.0
//! The kill matrix: the control plane is killed, or a step fails, at every fault point of every workflow, and again
//! during the recovery; then the promises are checked. It runs over `StepName::ALL`, so a new step enters it by itself,
//! and a step that no workflow reaches fails the test.
use std::collections::BTreeSet;
use std::time::Duration;

use super::{Verb, lock};
use crate::model::{ActorUid, State};
use crate::store::Store as _;
use crate::testing::Harness;
use crate::workflow::{FaultPoint, Injected, StepName, When};

/// A workflow, by what is asked of an actor that is running with one durable snapshot and work done since.
#[derive(Debug, Clone, Copy)]
enum Flow {
    Boot,
    Resume,
    FailedResume,
    Suspend,
    Pause,
    Promote,
    Checkpoint,
    Reset,
    Fork,
    Delete,
}

const FLOWS: [Flow; 10] = [
    Flow::Boot,
    Flow::Resume,
    Flow::FailedResume,
    Flow::Suspend,
    Flow::Pause,
    Flow::Promote,
    Flow::Checkpoint,
    Flow::Reset,
    Flow::Fork,
    Flow::Delete,
];

/// Brings an actor to where the flow begins. What its memory holds then is 1, durable.
async fn prepare(h: &Harness, flow: Flow) -> ActorUid {
    let uid = h.create("alice").await;
    if matches!(flow, Flow::Boot) {
        return uid;
    }
    h.resume(&uid).await.unwrap();
    h.nodes[0].work(uid.as_str());
    h.checkpoint(&uid, true).await.unwrap();
    match flow {
        Flow::Resume | Flow::FailedResume | Flow::Fork | Flow::Reset => {
            h.suspend(&uid).await.unwrap();
        }
        Flow::Promote => {
            h.pause(&uid).await.unwrap();
        }
        _ => {}
    }
    if matches!(flow, Flow::FailedResume) {
        h.nodes[0].fail("activate", tonic::Status::internal("no memory left"));
    }
    uid
}

fn verb(flow: Flow) -> Verb {
    let by = "user".to_owned();
    match flow {
        Flow::Boot | Flow::Resume | Flow::FailedResume => Verb::Resume { cause: by },
        Flow::Suspend => Verb::Suspend { by, only_if_idle: false, drain_ms: 0 },
        Flow::Pause => Verb::Pause { by, only_if_idle: false, drain_ms: 0, promote_after: None },
        Flow::Promote => Verb::Promote,
        Flow::Checkpoint => Verb::Checkpoint { durable: true, generation: 0, max_heap: 0 },
        Flow::Reset => Verb::Reset,
        Flow::Fork => Verb::Fork { name: "twin".into(), snapshot: String::new() },
        Flow::Delete => Verb::Delete,
    }
}

/// Waits until nothing is in progress any more.
async fn settle(h: &Harness, what: &str) {
    for _ in 0..200 {
        h.engine.pause(Duration::from_millis(250)).await;
        let at_rest = h.engine.drivers() == 0 && h.store.garbage(1).await.unwrap().is_empty();
        if h.engine.dead.is_cancelled() || at_rest {
            return;
        }
    }
    panic!("{what}: something is in progress for ever: {:?}", h.store.garbage(9).await);
}

/// P1–P5 on what is there now.
async fn check(h: &Harness, uid: &ActorUid, flow: Flow, what: &str) {
    let copies = h.copies(uid);
    assert!(copies <= 1, "{what}: {copies} live copies");
    let Some(actor) = h.find(uid).await else {
        assert!(matches!(flow, Flow::Delete), "{what}: the actor is gone");
        assert_eq!(copies, 0, "{what}: a deleted actor runs");
        assert!(h.blobs.manifests().is_empty(), "{what}: blobs are left");
        return;
    };
    assert!(
        !matches!(actor.state, State::Resuming | State::Suspending | State::Pausing | State::Deleting),
        "{what}: still {} after the recovery",
        actor.state
    );
    assert_eq!(copies == 1, actor.state == State::Running, "{what}: {} with {copies} copies", actor.state);
    // Never fewer than one good copy: what the record names exists.
    if let Some(last) = actor.last_snapshot() {
        let durable = format!("{}/{}-{}", last.origin, last.generation, last.id);
        if last.is_durable() {
            assert!(h.blobs.manifests().contains(&durable), "{what}: the manifest of {} is gone", last.id);
        } else {
            assert!(h.nodes[0].has_snapshot(uid.as_str(), last.id.as_str()), "{what}: the only copy is gone");
        }
    } else {
        assert!(matches!(flow, Flow::Boot), "{what}: the last good snapshot was lost");
    }
    // No worker leaked: what the pool books is what the records hold.
    let booked: Vec<_> = lock(&h.engine.pool).assignments(&"n0".into());
    assert_eq!(booked.len(), usize::from(actor.placement.is_some()), "{what}: a worker leaked");
    // A verb leads on, and what was kept is there.
    match actor.state {
        State::Running => {}
        State::New | State::Suspended | State::Paused => {
            h.resume(uid).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        State::Exited | State::Crashed => {
            h.ask(uid, Verb::Reset).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            return;
        }
        _ => unreachable!("checked above"),
    }
    if !matches!(flow, Flow::Boot | Flow::Reset) {
        let memory = h.nodes[0].copy_of(uid.as_str()).unwrap().memory;
        assert_eq!(memory, 1, "{what}: memory was lost");
    }
}

async fn run(flow: Flow, point: FaultPoint, nth: usize, fault: Injected, again: bool) -> bool {
    let what = format!("{flow:?}, {fault:?} {:?} {:?} ({nth}), again: {again}", point.when, point.step);
    let mut h = Harness::new(&[2]).await;
    let uid = prepare(&h, flow).await;
    settle(&h, &what).await;
    h.faults.set(point, nth, fault);
    let _ = h.ask(&uid, verb(flow)).await;
    settle(&h, &what).await;
    if !h.faults.is_spent() {
        return false;
    }
    if fault == Injected::Crash {
        if again {
            // And once more while it recovers, at the first commit it makes.
            h.faults.set(FaultPoint { step: StepName::Commit, when: When::After }, 0, Injected::Crash);
            h.restart().await;
            settle(&h, &what).await;
            h.faults.clear();
        }
        h.restart().await;
    }
    settle(&h, &what).await;
    h.nodes[0].stop_failing();
    check(&h, &uid, flow, &what).await;
    true
}

#[tokio::test(start_paused = true)]
async fn killed_at_every_point_of_every_workflow() {
    let mut reached = BTreeSet::new();
    for flow in FLOWS {
        for step in StepName::ALL {
            for when in [When::Before, When::After] {
                for nth in 0..8 {
                    let point = FaultPoint { step, when };
                    if !run(flow, point, nth, Injected::Crash, false).await {
                        break;
                    }
                    reached.insert(step);
                    run(flow, point, nth, Injected::Crash, true).await;
                }
            }
        }
    }
    let all: BTreeSet<_> = StepName::ALL.into_iter().collect();
    assert_eq!(reached, all, "a step that no workflow of this matrix reaches");
}

#[tokio::test(start_paused = true)]
async fn every_step_fails_once() {
    for flow in FLOWS {
        for step in StepName::ALL {
            // A live checkpoint that fails before it began is the only one whose memory may end with it; see its test.
            let ends_memory = matches!(step, StepName::Checkpoint | StepName::CheckpointLive);
            for when in [When::Before, When::After] {
                if ends_memory && when == When::Before {
                    continue;
                }
                for nth in 0..4 {
                    if !run(flow, FaultPoint { step, when }, nth, Injected::Fail, false).await {
                        break;
                    }
                }
            }
        }
    }
}
