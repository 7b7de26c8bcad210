// SPDX-License-Identifier: Apache-2.0
//! Golden snapshots over stub nodes.
use std::collections::HashMap;
use std::time::Duration;

use substrate_proto::{ateapi, types};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::Verb;
use crate::model::{Actor, State, Template};
use crate::store::{self, Kind, Query, Store as _};
use crate::testing::Harness;
use crate::testing::stub::corrupt;

async fn template(h: &Harness) -> Template {
    h.template("g", |spec| spec.golden = true).await;
    store::find(&*h.store, "space", "g").await.unwrap().unwrap()
}

async fn status(h: &Harness, template: &Template, wanted: &str) -> ateapi::Golden {
    for _ in 0..200 {
        let found = h.engine.golden_status(&template.uid);
        if let Some(golden) = found.into_iter().find(|golden| golden.state == wanted) {
            return golden;
        }
        h.engine.pause(Duration::from_secs(1)).await;
    }
    panic!("never {wanted}: {:?}", h.engine.golden_status(&template.uid));
}

async fn makers(h: &Harness) -> Vec<Actor> {
    store::list_all(&*h.store, Query::all(Kind::Golden)).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn new_actors_start_from_what_was_made_once() {
    let h = Harness::new(&[3]).await;
    let template = template(&h).await;
    let golden = status(&h, &template, "READY").await;
    assert_eq!(h.nodes[0].calls("checkpoint"), 1);
    assert_eq!(h.events("GoldenReady").await[0].subject, "g");
    for name in ["alice", "bob"] {
        let uid = h.create_from("g", name).await;
        h.resume(&uid).await.unwrap();
        let copy = h.nodes[0].copy_of(uid.as_str()).unwrap();
        assert!(copy.clone);
        assert_eq!(copy.identity["name"], name.as_bytes());
        let actor = h.actor(&uid).await;
        let first = actor.last_snapshot().unwrap();
        assert_eq!((first.id.as_str(), first.cause.as_str()), (golden.snapshot_id.as_str(), "golden"));
        // From then on it is an actor like any other.
        h.nodes[0].work(uid.as_str());
        h.suspend(&uid).await.unwrap();
        h.resume(&uid).await.unwrap();
        let copy = h.nodes[0].copy_of(uid.as_str()).unwrap();
        assert_eq!((copy.memory, copy.clone), (1, false));
    }
    assert_eq!(h.nodes[0].calls("checkpoint"), 3);
    // The maker is in no list of actors, and holds neither a worker nor the template.
    let actors: Vec<Actor> = store::list_all(&*h.store, Query::all(Kind::Actor)).await.unwrap();
    assert_eq!(actors.len(), 2);
    assert_eq!(makers(&h).await.len(), 1);
    assert_eq!(h.engine.usage_of("space").await.unwrap().0.actors, 2);
    let changes = h.store.changes(0, 10_000).await.unwrap();
    assert!(changes.iter().all(|change| !change.doc.contains("\"golden\":{")));
    for actor in actors {
        h.delete(&actor.uid).await.unwrap();
    }
    h.engine.delete_template("space", "g", None).await.unwrap();
    assert!(makers(&h).await.is_empty());
    assert!(h.blobs.manifests().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_an_actor_has_of_its_own_is_never_from_a_golden_snapshot() {
    let h = Harness::new(&[2]).await;
    let template = template(&h).await;
    status(&h, &template, "READY").await;
    let file = types::File { path: "/token".into(), mode: 0o400, content: b"secret".to_vec() };
    let spec = types::ActorSpec { template: "g".into(), files: vec![file], ..Default::default() };
    let actor = h.engine.create_actor("space", "alice", spec, None, false, None).await.unwrap();
    h.resume(&actor.uid).await.unwrap();
    assert!(!h.nodes[0].copy_of(actor.uid.as_str()).unwrap().clone);
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_told_with_its_log_and_tried_again() {
    let h = Harness::new(&[2]).await;
    let metadata =
        HashMap::from([("container".to_owned(), "main".to_owned()), ("code".to_owned(), "3".to_owned())]);
    let details = ErrorDetails::with_error_info("EXITED", "substrate", metadata);
    h.nodes[0].fail("activate", Status::with_error_details(Code::Internal, "it ended", details));
    let template = template(&h).await;
    let failed = status(&h, &template, "FAILED").await;
    assert_eq!(failed.attempts, 1);
    assert!(failed.message.contains("exited with code 3"), "{}", failed.message);
    assert!(failed.message.contains("log of _golden-"), "{}", failed.message);
    assert!(h.events("GoldenFailed").await[0].message.contains("log of _golden-"));
    // Actors are not held up by it.
    let uid = h.create_from("g", "alice").await;
    h.resume(&uid).await.unwrap();
    assert!(!h.nodes[0].copy_of(uid.as_str()).unwrap().clone);
    h.delete(&uid).await.unwrap();
    let ready = status(&h, &template, "READY").await;
    assert_eq!((&failed.id, failed.snapshot_id.as_str(), ready.message.as_str()), (&ready.id, "", ""));
    assert!(!ready.snapshot_id.is_empty());
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_be_restored_is_forgotten_by_the_actor() {
    let h = Harness::new(&[2]).await;
    let template = template(&h).await;
    status(&h, &template, "READY").await;
    let uid = h.create_from("g", "alice").await;
    h.nodes[0].fail("activate", corrupt("durable"));
    h.resume(&uid).await.unwrap();
    let actor = h.actor(&uid).await;
    assert_eq!((actor.state, actor.snapshots.len()), (State::Running, 0));
    assert!(!h.nodes[0].copy_of(uid.as_str()).unwrap().clone);
    // It let go of the blobs, and the template still holds them.
    h.delete(&uid).await.unwrap();
    assert_eq!(h.blobs.manifests().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_last_free_worker_is_left_to_those_who_wait() {
    let h = Harness::new(&[2]).await;
    let alice = h.running("alice").await;
    let template = template(&h).await;
    h.engine.pause(Duration::from_mins(2)).await;
    assert_eq!(h.engine.golden_status(&template.uid)[0].state, "PENDING");
    assert_eq!(h.nodes[0].calls("activate"), 1);
    h.suspend(&alice).await.unwrap();
    status(&h, &template, "READY").await;
}

#[tokio::test(start_paused = true)]
async fn a_start_goes_on_with_what_was_begun() {
    let mut h = Harness::new(&[2]).await;
    h.nodes[0].hold("checkpoint");
    let template = template(&h).await;
    h.nodes[0].called("checkpoint", 0).await;
    let before = makers(&h).await;
    assert_eq!(before[0].state, State::Suspending);
    h.restart().await;
    h.nodes[0].let_go("checkpoint");
    let ready = status(&h, &template, "READY").await;
    assert_eq!(makers(&h).await[0].last.as_ref().map(|id| id.0.clone()), Some(ready.snapshot_id));
    // It is known after another start without being made again.
    let boots = h.nodes[0].calls("activate");
    h.restart().await;
    status(&h, &template, "READY").await;
    assert_eq!(h.nodes[0].calls("activate"), boots);
    // No verb reaches the maker through what tenants can name.
    let key = crate::model::ActorKey::Uid(before[0].uid.clone());
    assert!(h.engine.lookup(&key).await.is_err());
    assert!(!crate::model::names::is_uid(before[0].uid.as_str()));
    let _ = h.ask(&before[0].uid, Verb::Delete).await;
}
