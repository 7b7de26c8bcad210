// SPDX-License-Identifier: Apache-2.0
//! Losing workers, nodes and copies, over stub nodes on a paused clock (P1, P2, P4).
use std::time::Duration;

use tonic::Status;

use super::tests::wait;
use super::{CallError, Verb};
use crate::model::State;
use crate::testing::Harness;

#[tokio::test(start_paused = true)]
async fn a_lost_worker_brings_the_actor_back_to_its_last_snapshot_and_says_so() {
    let h = Harness::new(&[2]).await;
    let uid = h.running("alice").await;
    h.nodes[0].work(uid.as_str());
    let kept = h.checkpoint(&uid, false).await.unwrap().snapshot.unwrap();
    h.nodes[0].work(uid.as_str());
    wait(&h, 7).await;
    h.nodes[0].kill_worker_of(uid.as_str());
    let actor = h.until_state(&uid, State::Paused).await;
    assert_eq!((actor.reason.as_str(), actor.last.as_ref()), ("WORKER_LOST", Some(&kept.id)));
    let events = h.events("RolledBack").await;
    assert_eq!(events[0].metadata["snapshot"], kept.id.0);
    assert!(events[0].metadata["age_ms"].parse::<i64>().unwrap() >= 7_000);
    h.resume(&uid).await.unwrap();
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 1);
}

#[tokio::test(start_paused = true)]
async fn without_a_snapshot_a_lost_worker_crashes_and_reset_leads_on() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].kill_worker_of(uid.as_str());
    h.until_state(&uid, State::Crashed).await;
    assert!(matches!(h.resume(&uid).await, Err(CallError::Refused(_))));
    h.ask(&uid, Verb::Reset).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_worker_lost_while_waking_is_replaced() {
    let h = Harness::new(&[2]).await;
    let uid = h.running("alice").await;
    h.suspend(&uid).await.unwrap();
    h.nodes[0].fail("activate", Status::unavailable("reset"));
    let answer = h.resume(&uid).await.unwrap();
    assert_eq!(answer.actor.state, State::Running);
    // Gone for good: another generation on another worker.
    h.suspend(&uid).await.unwrap();
    for _ in 0..5 {
        h.nodes[0].fail("activate", Status::unavailable("reset"));
    }
    let before = h.actor(&uid).await.generation.0;
    let answer = h.resume(&uid).await.unwrap();
    assert_eq!(answer.actor.generation.0, before + 2);
    assert_eq!(h.copies(&uid), 1);
}

#[tokio::test(start_paused = true)]
async fn a_worker_lost_while_stopping_keeps_a_snapshot_that_was_good() {
    let h = Harness::new(&[2]).await;
    let uid = h.running("alice").await;
    h.nodes[0].work(uid.as_str());
    // The checkpoint is done, its answer is lost, and then the worker dies.
    h.nodes[0].hold("release");
    let engine = std::sync::Arc::clone(&h.engine);
    let asked = uid.clone();
    let suspend = tokio::spawn(async move {
        engine.ask(&asked, Verb::Suspend { by: "user".into(), only_if_idle: false, drain_ms: 0 }, None).await
    });
    h.nodes[0].called("release", 0).await;
    let actor = h.actor(&uid).await;
    let lost = super::News::Lost { generation: actor.generation, message: "killed".into() };
    h.engine.tell(&uid, super::Command::News(lost));
    let answer = suspend.await.unwrap().unwrap();
    assert_eq!(answer.actor.state, State::Suspended);
    assert!(h.events("RolledBack").await.is_empty());
    h.nodes[0].let_go("release");
    h.resume(&uid).await.unwrap();
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 1);
}

#[tokio::test(start_paused = true)]
async fn a_worker_lost_before_the_snapshot_was_good_rolls_back() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.suspend(&uid).await.unwrap();
    h.resume(&uid).await.unwrap();
    h.nodes[0].fail("checkpoint", Status::internal("the sandbox died"));
    let error = h.suspend(&uid).await.unwrap_err();
    assert!(matches!(error, CallError::Failed { .. }), "{error}");
    let actor = h.actor(&uid).await;
    assert_eq!((actor.state, actor.reason.as_str()), (State::Suspended, "CHECKPOINT_FAILED"));
    assert_eq!(h.events("RolledBack").await.len(), 1);
    h.resume(&uid).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_node_is_given_up_only_after_its_lease_and_the_margin() {
    let h = Harness::new(&[1, 1]).await;
    let uid = h.running("alice").await;
    h.checkpoint(&uid, true).await.unwrap();
    let host = std::sync::Arc::clone(h.host(&uid));
    host.go_down();
    // Still ours: nothing may start elsewhere, and a suspend says why it cannot.
    wait(&h, 20).await;
    assert!(matches!(h.suspend(&uid).await, Err(CallError::NodeUnreachable(_))));
    assert_eq!(h.actor(&uid).await.state, State::Running);
    let down_at = h.clock.now();
    let actor = h.until_state(&uid, State::Suspended).await;
    assert_eq!(actor.reason, "WORKER_LOST");
    // 30 s of lease and 5 s of margin after the last grant, which was at most 10 s before it went down.
    assert!(h.clock.now().saturating_sub(down_at) >= Duration::from_secs(4));
    assert!(host.copies().is_empty(), "its lease has not ended: two copies would run");
    h.resume(&uid).await.unwrap();
    assert_eq!(h.copies(&uid), 1);
    // Healed: the old copy is released, not adopted.
    host.come_back();
    wait(&h, 60).await;
    assert_eq!(h.copies(&uid), 1);
    assert_eq!(h.nodes.iter().map(|node| node.copies().len()).sum::<usize>(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_short_silence_costs_nothing() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].work(uid.as_str());
    h.nodes[0].go_down();
    wait(&h, 15).await;
    h.nodes[0].come_back();
    wait(&h, 60).await;
    assert_eq!(h.actor(&uid).await.generation.0, 1);
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 1);
}

#[tokio::test(start_paused = true)]
async fn a_stop_of_the_control_plane_for_two_leases_loses_no_memory() {
    let mut h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.nodes[0].work(uid.as_str());
    h.engine.stop().await;
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert!(h.nodes[0].copies().is_empty(), "its lease has ended: it is frozen");
    h.restart().await;
    wait(&h, 60).await;
    assert_eq!(h.nodes[0].copy_of(uid.as_str()).unwrap().memory, 1);
    assert_eq!(h.actor(&uid).await.generation.0, 1);
    h.suspend(&uid).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reboot_ends_what_ran() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.checkpoint(&uid, false).await.unwrap();
    wait(&h, 1).await;
    h.nodes[0].reboot();
    let actor = h.until_state(&uid, State::Paused).await;
    assert_eq!(actor.reason, "WORKER_LOST");
    h.resume(&uid).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_paused_actor_moves_once_it_is_durable() {
    let h = Harness::new(&[1, 1]).await;
    let uid = h.running("alice").await;
    let home = std::sync::Arc::clone(h.host(&uid));
    home.work(uid.as_str());
    h.pause(&uid).await.unwrap();
    // Its node fills up.
    let other = h.create("bob").await;
    let worker =
        super::lock(&h.engine.pool).of_node(&home.name.as_str().into()).next().unwrap().record.id.clone();
    h.engine.cordon(&worker, true).await.unwrap();
    h.resume(&other).await.unwrap();
    h.delete(&other).await.unwrap();
    h.engine.cordon(&worker, false).await.unwrap();
    let filler = h.running("carol").await;
    if h.host(&filler).name != home.name {
        h.delete(&filler).await.unwrap();
        let away = h.nodes.iter().find(|node| node.name != home.name).unwrap();
        let id =
            super::lock(&h.engine.pool).of_node(&away.name.as_str().into()).next().unwrap().record.id.clone();
        h.engine.cordon(&id, true).await.unwrap();
        h.running("dave").await;
        h.engine.cordon(&id, false).await.unwrap();
    }
    h.resume(&uid).await.unwrap();
    let host = h.host(&uid);
    assert_ne!(host.name, home.name);
    assert_eq!(host.copy_of(uid.as_str()).unwrap().memory, 1);
}

#[tokio::test(start_paused = true)]
async fn losses_told_again_at_the_start_of_a_session_change_nothing() {
    let mut h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.checkpoint(&uid, true).await.unwrap();
    h.nodes[0].kill_worker_of(uid.as_str());
    h.until_state(&uid, State::Suspended).await;
    h.nodes[0].tell_losses_again();
    h.restart().await;
    h.resume(&uid).await.unwrap();
    wait(&h, 5).await;
    assert_eq!(h.actor(&uid).await.state, State::Running);
    assert_eq!(h.events("WorkerLost").await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_is_lost_before_its_upload_goes_back_to_the_durable_one() {
    let h = Harness::new(&[1]).await;
    let uid = h.running("alice").await;
    h.suspend(&uid).await.unwrap();
    h.resume(&uid).await.unwrap();
    h.pause(&uid).await.unwrap();
    h.nodes[0].fail("upload", crate::testing::stub::corrupt("node"));
    assert!(h.ask(&uid, Verb::Promote).await.is_err());
    let actor = h.actor(&uid).await;
    assert_eq!((actor.state, actor.reason.as_str()), (State::Suspended, "SNAPSHOT_LOST"));
    assert_eq!(h.events("RolledBack").await.len(), 1);
    h.resume(&uid).await.unwrap();
}
