// SPDX-License-Identifier: Apache-2.0
//! Records to begin with.
use std::collections::BTreeSet;

use substrate_proto::types;

use crate::model::{Actor, Generation, Snapshot, SnapshotId};

/// A new actor.
pub fn actor() -> Actor {
    Actor {
        atespace: "space".into(),
        name: "alice".into(),
        spec: types::ActorSpec { template: "t".into(), ..Default::default() },
        class: "gvisor".into(),
        ports: vec![8080],
        keep_last: 2,
        ..Actor::fresh("u-1".into(), "t-1".into(), 0)
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
