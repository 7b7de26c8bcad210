// SPDX-License-Identifier: Apache-2.0
//! Watching: a full snapshot at every connect, then changes; nothing missed, no polling, healed after interruptions.
use std::time::Duration;

use crate::stub::{Bench, Boot, phase, sandbox};
use openshell_driver_substrate::mirror::progress;
use substrate_proto::ateapi::ActorState;
use substrate_proto::compute::{WatchSandboxesEvent, watch_sandboxes_event::Payload};
use tonic::{Code, Streaming};

const ID: &str = "0198c0de-0000-7000-8000-000000000001";

type Watching = Streaming<WatchSandboxesEvent>;

async fn next(watching: &mut Watching) -> Payload {
    tokio::time::timeout(Duration::from_secs(20), watching.message())
        .await
        .expect("an event in time")
        .unwrap()
        .expect("the stream goes on")
        .payload
        .unwrap()
}

fn show(payload: &Payload) -> String {
    match payload {
        Payload::Sandbox(event) => {
            let sandbox = event.sandbox.as_ref().unwrap();
            format!("{} {}", sandbox.id, phase(sandbox))
        }
        Payload::Deleted(event) => format!("{} deleted", event.sandbox_id),
        Payload::PlatformEvent(event) => {
            format!("{} event {}", event.sandbox_id, event.event.as_ref().unwrap().reason)
        }
    }
}

async fn until(watching: &mut Watching, wanted: &str) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        seen.push(show(&next(watching).await));
        if seen.last().unwrap() == wanted {
            return seen;
        }
    }
}

#[tokio::test]
async fn every_connect_begins_with_everything_and_goes_on_with_changes() {
    let mut bench = Bench::start().await;
    for id in ["a", "b"] {
        bench.create(sandbox(id, id)).await.unwrap();
    }
    bench.stop("b").await.unwrap();
    let mut first = bench.watch().await.unwrap();
    let mut snapshot = [show(&next(&mut first).await), show(&next(&mut first).await)];
    snapshot.sort();
    assert_eq!(snapshot, ["a ready", "b stopped"]);
    bench.start_sandbox("b").await.unwrap();
    let seen = until(&mut first, "b ready").await;
    assert!(seen.contains(&"b provisioning".to_owned()), "a start shows: {seen:?}");
    let mut second = bench.watch().await.unwrap();
    let mut snapshot = [show(&next(&mut second).await), show(&next(&mut second).await)];
    snapshot.sort();
    assert_eq!(snapshot, ["a ready", "b ready"]);
    assert!(bench.delete("a").await.unwrap());
    for watching in [&mut first, &mut second] {
        until(watching, "a deleted").await;
    }
    assert_eq!(bench.stub.calls("watch"), 1, "one watch for all");
    assert!(bench.stub.calls("list_actors") < 12, "no polling");
}

#[tokio::test]
async fn a_first_boot_is_shown_step_by_step() {
    let mut bench = Bench::start().await;
    let mut watching = bench.watch().await.unwrap();
    bench.stub.boot(Boot::Waits);
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let mut active = Vec::new();
    let mut complete = Vec::new();
    let mut details = Vec::new();
    let mut started = false;
    while !started {
        if let Payload::PlatformEvent(event) = next(&mut watching).await {
            let event = event.event.unwrap();
            active.extend(event.metadata.get(progress::ACTIVE_STEP).cloned());
            complete.extend(event.metadata.get(progress::COMPLETE_STEP).cloned());
            details.extend(event.metadata.get(progress::ACTIVE_DETAIL).cloned());
            started = event.reason == "Started";
            if event.reason == "Scheduled" {
                bench.stub.change(ID, |actor| actor.state = ActorState::Running.into());
            }
        }
    }
    for step in [progress::PULLING, progress::STARTING] {
        assert!(active.contains(&step.to_owned()), "{active:?}");
    }
    for step in [progress::REQUESTING, progress::PULLING, progress::STARTING] {
        assert!(complete.contains(&step.to_owned()), "{complete:?}");
    }
    assert!(details.contains(&"50 %".to_owned()), "{details:?}");
    // A later sleep and waking is nobody's progress.
    bench.stub.sleep(ID, "idle");
    bench.stub.wake(ID);
    bench.stub.event(ID, "WorkerLost");
    let seen = until(&mut watching, &format!("{ID} event WorkerLost")).await;
    assert!(
        seen.iter().all(|line| !line.contains("provisioning") && !line.contains("event Start")),
        "{seen:?}"
    );
}

#[tokio::test]
async fn a_lost_and_recovered_worker_is_no_error() {
    let mut bench = Bench::start().await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    let mut watching = bench.watch().await.unwrap();
    bench.stub.change(ID, |actor| {
        actor.state = ActorState::Suspended.into();
        actor.reason = "WORKER_LOST".to_owned();
        actor.message = "worker w1 died; back at the snapshot of 3 s ago".to_owned();
        actor.last_snapshot = Some(substrate_proto::ateapi::Snapshot::default());
    });
    bench.stub.wake(ID);
    bench.stub.event(ID, "Done");
    let seen = until(&mut watching, &format!("{ID} event Done")).await;
    assert!(seen.iter().all(|line| line.contains("ready") || line.contains("event")), "{seen:?}");
}

#[tokio::test]
async fn a_restart_of_the_control_plane_heals_and_shows_what_went_missing() {
    let mut bench = Bench::start().await;
    for id in ["a", "b"] {
        bench.create(sandbox(id, id)).await.unwrap();
    }
    let mut watching = bench.watch().await.unwrap();
    bench.stop_api().await;
    let error = bench.client.clone();
    // Nobody tells the driver of these.
    bench.stub.remove_actor(&openshell_driver_substrate::names::uid("a"));
    bench.stub.sleep("b", "drain");
    drop(error);
    bench.start_api();
    let seen = until(&mut watching, "a deleted").await;
    assert!(!seen.contains(&"b deleted".to_owned()));
    bench.create(sandbox("c", "c")).await.unwrap();
    until(&mut watching, "c ready").await;
}

#[tokio::test]
async fn without_the_control_plane_a_watch_is_refused_rather_than_empty() {
    let mut bench = Bench::start().await;
    bench.create(sandbox(ID, "alice")).await.unwrap();
    bench.stop_api().await;
    bench.stop_driver().await;
    bench.start_driver().await;
    let error = bench.watch().await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(&bench.config.api_endpoint), "{error}");
    bench.start_api();
    let mut watching = bench.watch().await.unwrap();
    assert_eq!(show(&next(&mut watching).await), format!("{ID} ready"));
}

#[tokio::test]
async fn a_driver_that_stops_ends_its_watches() {
    let mut bench = Bench::start().await;
    let mut watching = bench.watch().await.unwrap();
    bench.stop_driver().await;
    let end = tokio::time::timeout(Duration::from_secs(10), watching.message()).await.unwrap();
    assert!(!matches!(end, Ok(Some(_))));
}
