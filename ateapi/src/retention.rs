// SPDX-License-Identifier: Apache-2.0
//! Which snapshots of an actor stay.
//!
//! The latest, tagged ones, and the newest `keep_last` durable ones stay. A snapshot that is only on a node is
//! superseded by a newer latest one, unless its upload is owed for a tag. A node's copy may be dropped once the
//! snapshot is durable. What is dropped here leaves the actor's record in the same commit; its blobs become garbage
//! only when no other committed manifest names them (P2).
use crate::model::{Actor, NodeName, Snapshot};
use crate::store::{Garbage, RefChange};

/// Durable snapshots kept when the template does not say.
pub const DEFAULT_KEEP_LAST: u32 = 2;

/// What a pass drops.
#[derive(Debug, Default, PartialEq)]
pub struct Retired {
    /// References that end.
    pub refs: Vec<RefChange>,
    /// Node copies that may go.
    pub garbage: Vec<Garbage>,
    /// Snapshots that left the record.
    pub snapshots: Vec<Snapshot>,
}

/// The holder of a snapshot's blobs, as the store knows it.
pub fn holder(actor: &Actor, snapshot: &Snapshot) -> String {
    format!("{}/{}", actor.uid, snapshot.id)
}

/// What a durable snapshot's manifest names, itself included.
pub fn blobs(snapshot: &Snapshot) -> Vec<Garbage> {
    let mut blobs = vec![Garbage::Manifest {
        actor: snapshot.origin.0.clone(),
        directory: format!("{}-{}", snapshot.generation, snapshot.id),
    }];
    blobs.extend(snapshot.packs.iter().map(|key| Garbage::Pack { key: key.clone() }));
    blobs
}

/// Leave for a node to drop its copy.
pub fn node_copy(snapshot: &Snapshot, node: &NodeName) -> Garbage {
    Garbage::NodeCopy {
        node: node.0.clone(),
        actor: snapshot.origin.0.clone(),
        snapshot: snapshot.id.0.clone(),
    }
}

/// Drops what need not stay from the record and says what follows from it.
pub fn retire(actor: &mut Actor) -> Retired {
    let mut retired = Retired::default();
    let last_at = actor.last.as_ref().and_then(|id| actor.snapshots.iter().position(|it| it.id == *id));
    let mut durable_left = actor.keep_last.max(1);
    let mut keep = vec![false; actor.snapshots.len()];
    for (index, snapshot) in actor.snapshots.iter().enumerate().rev() {
        let is_last = Some(index) == last_at;
        keep[index] = if snapshot.is_durable() {
            let counted = durable_left > 0;
            durable_left = durable_left.saturating_sub(1);
            counted || is_last || !snapshot.tags.is_empty()
        } else {
            // Newer than the latest: someone reverted, and may want to come back.
            is_last || !snapshot.tags.is_empty() || last_at.is_none_or(|last| index > last)
        };
    }
    let mut index = 0;
    let mut dropped = Vec::new();
    actor.snapshots.retain(|snapshot| {
        let stays = keep[index];
        index += 1;
        if !stays {
            dropped.push(snapshot.clone());
        }
        stays
    });
    for snapshot in dropped {
        if snapshot.is_durable() {
            retired.refs.push(RefChange::Drop { holder: holder(actor, &snapshot) });
        }
        if let Some(node) = &snapshot.node {
            retired.garbage.push(node_copy(&snapshot, node));
        }
        retired.snapshots.push(snapshot);
    }
    retired
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fixtures::{actor, snapshot};

    fn ids(actor: &Actor) -> Vec<&str> {
        actor.snapshots.iter().map(|it| it.id.as_str()).collect()
    }

    #[test]
    fn the_newest_durable_ones_the_latest_and_tags_stay() {
        let mut actor = actor();
        actor.keep_last = 2;
        actor.snapshots = (1..=5).map(|i| snapshot(&format!("s{i}"), true)).collect();
        actor.snapshots[0].tags.insert("golden".into());
        actor.last = Some("s5".into());
        let retired = retire(&mut actor);
        assert_eq!(ids(&actor), ["s1", "s4", "s5"]);
        assert_eq!(retired.snapshots.iter().map(|it| it.id.as_str()).collect::<Vec<_>>(), ["s2", "s3"]);
        assert_eq!(retired.refs[0], RefChange::Drop { holder: format!("{}/s2", actor.uid) });
        assert_eq!(retire(&mut actor), Retired::default());
    }

    #[test]
    fn the_latest_stays_even_when_it_is_old() {
        let mut actor = actor();
        actor.keep_last = 1;
        actor.snapshots = vec![snapshot("s1", true), snapshot("s2", true), snapshot("s3", true)];
        actor.last = Some("s1".into());
        retire(&mut actor);
        assert_eq!(ids(&actor), ["s1", "s3"]);
    }

    #[test]
    fn a_node_snapshot_goes_once_a_newer_one_is_the_latest() {
        let mut actor = actor();
        actor.snapshots = vec![snapshot("d1", true), snapshot("n2", false), snapshot("n3", false)];
        actor.last = Some("n3".into());
        let retired = retire(&mut actor);
        // The durable one stays below a node snapshot: it is what is left when the node is lost.
        assert_eq!(ids(&actor), ["d1", "n3"]);
        assert_eq!(retired.garbage.len(), 1);
        assert!(retired.refs.is_empty());
    }

    #[test]
    fn what_was_reverted_from_stays_reachable() {
        let mut actor = actor();
        actor.snapshots = vec![snapshot("d1", true), snapshot("n2", false)];
        actor.last = Some("d1".into());
        assert_eq!(retire(&mut actor), Retired::default());
    }

    proptest::proptest! {
        #[test]
        fn never_the_last_nor_a_tagged_one(
            made in proptest::collection::vec((proptest::bool::ANY, proptest::bool::ANY), 1..12),
            last in 0usize..12,
            keep_last in 0u32..5,
        ) {
            let mut actor = actor();
            actor.keep_last = keep_last;
            for (i, (durable, tagged)) in made.iter().enumerate() {
                let mut it = snapshot(&format!("s{i}"), *durable);
                if *tagged { it.tags.insert(format!("t{i}")); }
                actor.snapshots.push(it);
            }
            let last = actor.snapshots[last % made.len()].id.clone();
            actor.last = Some(last.clone());
            let before = actor.clone();
            let retired = retire(&mut actor);
            proptest::prop_assert!(actor.snapshot(&last).is_some());
            for it in &retired.snapshots {
                proptest::prop_assert!(it.tags.is_empty() && it.id != last);
            }
            proptest::prop_assert_eq!(actor.snapshots.len() + retired.snapshots.len(), before.snapshots.len());
            // One durable copy stays if there was one.
            let durable = |a: &Actor| a.snapshots.iter().any(Snapshot::is_durable);
            proptest::prop_assert_eq!(durable(&before), durable(&actor));
        }
    }
}
