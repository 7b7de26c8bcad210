// SPDX-License-Identifier: Apache-2.0
//! What the control plane knows of the blob store: the decision which objects live.
//!
//! The usual way of an object is the collector's (`engine/background.rs`): its last reference is dropped and it
//! becomes garbage in the same commit. Here is what that way cannot know: objects that never had a reference, because
//! an upload died. They are found by comparing a listing with the database, in this order, which makes it safe beside
//! everything that goes on:
//!
//! 1. The objects are listed. 2. The database is read. 3. What is an [`Fate::Orphan`] is deleted.
//!
//! An object in the listing was begun before the database was read, and an upload begins only after its snapshot is in
//! its actor's record (P2). So at the time of the reading, a listed object is referenced; or its snapshot is in a
//! record without a manifest, and its upload may be under way or finished without having been recorded (then nothing
//! below its directory is touched); or its snapshot is recorded with a manifest that does not name it, or in no record
//! at all: then no commit can name it any more, since a snapshot's id is used once, and an upload refers to other
//! snapshots only by committed manifests, whose packs are referenced.
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _};

use crate::model::{Actor, Snapshot};
use crate::retention;
use crate::store::{Garbage, Kind, StoreError};

/// What becomes of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// A committed snapshot names it.
    Live,
    /// The control plane deletes it.
    Doomed,
    /// Of a snapshot whose upload has not been recorded.
    Pending,
    /// Nothing names it, nothing will.
    Orphan,
    /// Not of this system.
    Foreign,
}

/// What the database says, all of one moment.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Every actor, and the makers of golden snapshots.
    pub actors: Vec<Actor>,
    counted: BTreeMap<String, BTreeSet<Garbage>>,
    live: BTreeSet<String>,
    doomed: BTreeSet<String>,
    pending: BTreeSet<String>,
    uids: BTreeSet<String>,
}

/// The key of an object.
fn key(blob: &Garbage) -> Option<String> {
    match blob {
        Garbage::Manifest { actor, directory } => Some(format!("actors/{actor}/{directory}/manifest")),
        Garbage::Pack { key } => Some(key.clone()),
        Garbage::NodeCopy { .. } | Garbage::Purge { .. } => None,
    }
}

fn directory(snapshot: &Snapshot) -> String {
    format!("actors/{}/{}-{}", snapshot.origin, snapshot.generation, snapshot.id)
}

impl Inventory {
    /// Of records, references (holder and blob) and garbage.
    pub fn new(
        actors: Vec<Actor>,
        refs: impl IntoIterator<Item = (String, Garbage)>,
        garbage: impl IntoIterator<Item = Garbage>,
    ) -> Self {
        let mut all = Self { actors, ..Self::default() };
        for (holder, blob) in refs {
            all.live.extend(key(&blob));
            all.counted.entry(holder).or_default().insert(blob);
        }
        all.doomed.extend(garbage.into_iter().filter_map(|blob| key(&blob)));
        all.uids.extend(all.actors.iter().map(|actor| actor.uid.0.clone()));
        for snapshot in all.actors.iter().flat_map(|actor| &actor.snapshots) {
            all.uids.insert(snapshot.origin.0.clone());
            if snapshot.is_durable() {
                all.live.extend(retention::blobs(snapshot).iter().filter_map(key));
            } else {
                all.pending.insert(directory(snapshot));
            }
        }
        all
    }

    /// Reads a control plane's database, also while it is in use.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub async fn read(path: &Path) -> Result<Self, StoreError> {
        let unusable = |error: &dyn std::fmt::Display| {
            StoreError::Unusable(format!("cannot read database {}: {error}", path.display()))
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .read_only(true)
            .busy_timeout(std::time::Duration::from_secs(10))
            .disable_statement_logging();
        let mut connection =
            SqliteConnection::connect_with(&options).await.map_err(|error| unusable(&error))?;
        let read = async {
            // One moment for all three.
            let mut tx = connection.begin().await?;
            let actors: Vec<String> = sqlx::query_scalar("SELECT doc FROM objects WHERE kind IN (?, ?)")
                .bind(Kind::Actor as i64)
                .bind(Kind::Golden as i64)
                .fetch_all(&mut *tx)
                .await?;
            let refs: Vec<(String, String)> =
                sqlx::query_as("SELECT holder, blob FROM refs").fetch_all(&mut *tx).await?;
            let garbage: Vec<String> =
                sqlx::query_scalar("SELECT item FROM garbage").fetch_all(&mut *tx).await?;
            tx.commit().await?;
            Ok::<_, sqlx::Error>((actors, refs, garbage))
        }
        .await;
        if let Err(error) = connection.close().await {
            tracing::debug!(%error, "closing a database that was only read");
        }
        let (actors, refs, garbage) = read.map_err(|error| unusable(&error))?;
        let parsed = || {
            Ok::<_, serde_json::Error>(Self::new(
                actors.iter().map(|doc| serde_json::from_str(doc)).collect::<Result<_, _>>()?,
                refs.into_iter()
                    .map(|(holder, blob)| Ok((holder, serde_json::from_str(&blob)?)))
                    .collect::<Result<Vec<_>, serde_json::Error>>()?,
                garbage.iter().map(|item| serde_json::from_str(item)).collect::<Result<Vec<_>, _>>()?,
            ))
        };
        parsed().map_err(|error| unusable(&error))
    }

    /// What becomes of an object that was listed before this was read.
    pub fn fate(&self, key: &str) -> Fate {
        if self.live.contains(key) {
            return Fate::Live;
        }
        if self.doomed.contains(key) {
            return Fate::Doomed;
        }
        let parts: Vec<&str> = key.split('/').collect();
        let directory = match parts.as_slice() {
            ["actors", uid, snapshot, "manifest"] | ["actors", uid, snapshot, "packs", _] => {
                format!("actors/{uid}/{snapshot}")
            }
            _ => return Fate::Foreign,
        };
        if self.pending.contains(&directory) { Fate::Pending } else { Fate::Orphan }
    }

    /// Every snapshot with its actor.
    pub fn snapshots(&self) -> impl Iterator<Item = (&Actor, &Snapshot)> {
        self.actors.iter().flat_map(|actor| actor.snapshots.iter().map(move |snapshot| (actor, snapshot)))
    }

    /// Whether an actor of this uid exists, or one that was made from it still uses its snapshots.
    pub fn knows(&self, uid: &str) -> bool {
        self.uids.contains(uid)
    }

    /// Where records and references differ, which they never may: the thing and what is wrong.
    pub fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut holders = BTreeSet::new();
        for (actor, snapshot) in self.snapshots().filter(|(_, snapshot)| snapshot.is_durable()) {
            let holder = retention::holder(actor, snapshot);
            let counted = self.counted.get(&holder);
            for blob in retention::blobs(snapshot) {
                let Some(key) = key(&blob) else { continue };
                if !counted.is_some_and(|counted| counted.contains(&blob)) {
                    found.push(format!(
                        "snapshot {} of {}/{}: {key} is named by its record, but not counted",
                        snapshot.id, actor.atespace, actor.name
                    ));
                }
                if self.doomed.contains(&key) {
                    found.push(format!(
                        "snapshot {} of {}/{}: {key} is named by its record, but about to be deleted",
                        snapshot.id, actor.atespace, actor.name
                    ));
                }
            }
            holders.insert(holder);
        }
        for holder in self.counted.keys().filter(|holder| !holders.contains(*holder)) {
            found.push(format!(
                "references of {holder}: no record names this snapshot, so they are never dropped"
            ));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{GoldenMaker, Stored as _};
    use crate::store::{Expect, SqliteStore, Store as _, Tx};
    use crate::testing::fixtures::{actor, snapshot};

    #[test]
    fn only_what_nothing_can_name_any_more_is_an_orphan() {
        let mut actor = actor();
        let mut durable = snapshot("s1", true);
        durable.packs = vec!["actors/other/1-x/packs/p".into()];
        let owed = snapshot("s2", false);
        let refs: Vec<(String, Garbage)> = retention::blobs(&durable)
            .into_iter()
            .map(|blob| (retention::holder(&actor, &durable), blob))
            .collect();
        let (mine, theirs) = (directory(&durable), directory(&owed));
        actor.snapshots = vec![durable, owed];
        let doomed = Garbage::Pack { key: "actors/other/1-x/packs/q".into() };
        let all = Inventory::new(vec![actor.clone()], refs, [doomed]);
        for (key, fate) in [
            (format!("{mine}/manifest"), Fate::Live),
            ("actors/other/1-x/packs/p".into(), Fate::Live),
            ("actors/other/1-x/packs/q".into(), Fate::Doomed),
            // Of an earlier attempt: its manifest names another one.
            (format!("{mine}/packs/0"), Fate::Orphan),
            (format!("{theirs}/packs/0"), Fate::Pending),
            (format!("{theirs}/manifest"), Fate::Pending),
            ("actors/other/1-x/manifest".into(), Fate::Orphan),
            ("actors/other/1-x/packs/r".into(), Fate::Orphan),
            ("readme.txt".into(), Fate::Foreign),
            ("actors/other/notes".into(), Fate::Foreign),
        ] {
            assert_eq!(all.fate(&key), fate, "{key}");
        }
        assert_eq!(all.contradictions(), Vec::<String>::new());
        assert!(all.knows(actor.uid.as_str()) && !all.knows("other"));
    }

    #[tokio::test]
    async fn what_a_maker_of_golden_snapshots_holds_is_no_orphan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let store = SqliteStore::open(&path).await.unwrap();
        let mut maker = actor();
        maker.golden = Some(GoldenMaker { runtime_digest: "sha256:r".into() });
        maker.snapshots = vec![snapshot("s1", false)];
        let puts = vec![(maker.object(), Expect::Absent)];
        store.commit(Tx { puts, ..Tx::default() }).await.unwrap();
        let all = Inventory::read(&path).await.unwrap();
        let upload = directory(&maker.snapshots[0]);
        assert_eq!(all.fate(&format!("{upload}/packs/0")), Fate::Pending);
        assert!(all.knows(maker.uid.as_str()));
    }

    #[test]
    fn records_and_references_that_differ_are_named() {
        let mut actor = actor();
        actor.snapshots = vec![snapshot("s1", true)];
        let doomed = retention::blobs(&actor.snapshots[0]);
        let stale = ("gone/s0".to_owned(), Garbage::Pack { key: "actors/gone/1-s0/packs/p".into() });
        let found = Inventory::new(vec![actor], [stale], doomed).contradictions();
        for words in ["not counted", "about to be deleted", "references of gone/s0"] {
            assert!(found.iter().any(|line| line.contains(words)), "{words}: {found:?}");
        }
    }
}
