// SPDX-License-Identifier: Apache-2.0
//! Records to begin with.
use std::collections::{BTreeMap, BTreeSet};

use substrate_proto::types;

use crate::model::{Actor, Generation, Snapshot, SnapshotId, State};

/// A new actor.
pub fn actor() -> Actor {
    Actor {
        uid: "u-1".into(),
        atespace: "space".into(),
        name: "alice".into(),
        spec: types::ActorSpec { template: "t".into(), ..Default::default() },
        template_uid: "t-1".into(),
        class: "gvisor".into(),
        pool: String::new(),
        ports: vec![8080],
        checkpoint: types::CheckpointPolicy::default(),
        keep_last: 2,
        holds_identity: false,
        idle: types::IdlePolicy::default(),
        egress: None,
        egress_revision: 1,
        egress_names: BTreeMap::new(),
        state: State::New,
        reason: String::new(),
        message: String::new(),
        state_since_ms: 0,
        created_ms: 0,
        generation: Generation(0),
        placement: None,
        ingress_endpoint: String::new(),
        snapshots: Vec::new(),
        last: None,
        exit: None,
        suspended_by: String::new(),
        progress_step: String::new(),
        progress_percent: 0,
        work: None,
        nodes: BTreeSet::new(),
        promote_at_ms: 0,
        clone: false,
        golden: None,
        boots_cold: false,
        revision: 0,
    }
}

/// A snapshot on node "n1", durable or not.
pub fn snapshot(id: &str, durable: bool) -> Snapshot {
    Snapshot {
        id: SnapshotId(id.to_owned()),
        origin: "u-1".into(),
        generation: Generation(1),
        time_ms: 1_000,
        bytes: 10,
        stored_bytes: if durable { 5 } else { 0 },
        node: Some("n1".into()),
        node_digest: format!("nd-{id}"),
        manifest: durable.then(|| format!("md-{id}")),
        packs: if durable { vec![format!("packs/{id}")] } else { Vec::new() },
        compatibility: types::Compatibility::default(),
        cause: "suspend".to_owned(),
        tags: BTreeSet::new(),
        upload: None,
    }
}
