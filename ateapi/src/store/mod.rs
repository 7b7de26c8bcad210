// SPDX-License-Identifier: Apache-2.0
//! The store of the control plane.
//!
//! **Specification.** Records are documents in a few kinds, each with a unique key and a unique (kind, atespace, name).
//! A [`Tx`] is applied as a whole or not at all. Its preconditions ([`Expect`], [`Check`]) are evaluated against the
//! state that all earlier transactions left, so that two transactions never pass on the same old row. Every change of
//! a transaction (put, delete, note, event) gets one revision from a single sequence without gaps, and is in the
//! changelog when the transaction is; a revision is visible to readers only when all lower ones are. `commit` returns
//! when the transaction survives a power loss. The changelog is trimmed from its old end only.
//!
//! A blob (manifest or pack) is deleted only after the last holder's reference was dropped: the same transaction then
//! turns it into garbage, which a collector works off.
mod batch;
mod copy;
mod memory;
mod rows;
mod sqlite;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trouble_tests;
mod typed;
mod wal;
mod write;

use std::fs::File;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub(crate) use copy::{
    Copied, any_sealed, begin_new_history, check_copy, copy_database, known_schema, read_copy, schema_of,
};
pub use memory::MemoryStore;
pub use sqlite::SqliteStore;
pub use typed::{find, list, list_all, load, load_kind, parse};

use crate::model::EventDraft;

/// The kinds of records and changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(i64)]
pub enum Kind {
    /// An atespace.
    Atespace = 1,
    /// A template.
    Template = 2,
    /// An actor.
    Actor = 3,
    /// A worker.
    Worker = 4,
    /// A node; not in the changelog.
    Node = 5,
    /// Only in the changelog: snapshots are part of their actor's record.
    Snapshot = 6,
    /// Only in the changelog and the list of events.
    Event = 7,
    /// An actor that makes a golden snapshot; not in the changelog.
    Golden = 8,
}

impl Kind {
    /// As the API names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Atespace => "atespace",
            Self::Template => "template",
            Self::Actor => "actor",
            Self::Worker => "worker",
            Self::Node => "node",
            Self::Snapshot => "snapshot",
            Self::Event => "event",
            Self::Golden => "golden",
        }
    }

    /// Whether watches are told of it.
    fn is_watched(self) -> bool {
        !matches!(self, Self::Node | Self::Golden)
    }

    fn from_i64(number: i64) -> Option<Self> {
        [
            Self::Atespace,
            Self::Template,
            Self::Actor,
            Self::Worker,
            Self::Node,
            Self::Snapshot,
            Self::Event,
            Self::Golden,
        ]
        .into_iter()
        .find(|kind| *kind as i64 == number)
    }
}

/// A row: what is looked up by, and the document.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Object {
    pub kind: Kind,
    pub key: String,
    pub atespace: String,
    pub name: String,
    pub state: i64,
    pub template: String,
    pub busy: bool,
    pub revision: u64,
    pub doc: String,
}

/// What a row has to be for a transaction to pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Whatever.
    Any,
    /// Not there, and neither is its name.
    Absent,
    /// Of this revision.
    Revision(u64),
}

impl Expect {
    /// Whether a row of this revision, or none, is what is expected.
    fn fits(&self, revision: Option<u64>) -> bool {
        match self {
            Self::Any => true,
            Self::Absent => revision.is_none(),
            Self::Revision(expected) => revision == Some(*expected),
        }
    }
}

/// A precondition besides the rows written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// This record exists.
    Exists(Kind, String),
    /// No actor was made from this template (uid).
    TemplateUnused(String),
    /// This atespace holds neither actors nor templates.
    AtespaceEmpty(String),
    /// This atespace holds fewer actors than that.
    ActorsBelow(String, u64),
}

/// A change of something that is no row of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Note {
    pub kind: Kind,
    pub key: String,
    pub atespace: String,
    pub name: String,
    pub deleted: bool,
    pub doc: String,
}

/// What a request id led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestRecord {
    /// Method and id.
    pub id: String,
    /// Digest of what was asked: the same id for something else is refused.
    pub fingerprint: String,
    /// Id of the result: an actor's uid or a snapshot's id.
    pub outcome: String,
    /// Unix time, ms.
    pub time_ms: i64,
}

/// Something a node has still to delete.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Garbage {
    /// `<generation>-<snapshot>` under an actor.
    Manifest { actor: String, directory: String },
    /// A pack's key.
    Pack { key: String },
    /// Leave to drop a node's copy of a snapshot.
    NodeCopy { node: String, actor: String, snapshot: String },
    /// Everything a node still has of a deleted actor.
    Purge { node: String, actor: String, atespace: String, name: String },
}

/// Change of what a committed manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefChange {
    /// The holder's manifest is committed and names these.
    Hold {
        /// `<actor>/<snapshot>`.
        holder: String,
        /// Manifests and packs.
        blobs: Vec<Garbage>,
    },
    /// The holder is gone; what only it named becomes garbage.
    Drop {
        /// `<actor>/<snapshot>`.
        holder: String,
    },
}

/// Changes that are committed together.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct Tx {
    pub checks: Vec<Check>,
    pub puts: Vec<(Object, Expect)>,
    pub deletes: Vec<(Kind, String, Expect)>,
    pub notes: Vec<Note>,
    pub events: Vec<EventDraft>,
    pub request: Option<RequestRecord>,
    /// Value none: removed.
    pub seals: Vec<(String, Option<Vec<u8>>)>,
    pub refs: Vec<RefChange>,
    pub garbage: Vec<Garbage>,
    pub garbage_done: Vec<i64>,
    /// What the changes above add to, or take from, what atespaces use.
    pub usage: Vec<UsageChange>,
}

/// A change of what an atespace uses.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct UsageChange {
    pub atespace: String,
    pub actors: i64,
    pub bytes: i64,
}

/// What an atespace uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Actors.
    pub actors: u64,
    /// Bytes of their snapshots.
    pub bytes: u64,
}

/// What a commit gave out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Revision of each put, in order.
    pub puts: Vec<u64>,
    /// The store's revision after it.
    pub revision: u64,
}

/// A committed change.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Change {
    pub revision: u64,
    pub kind: Kind,
    pub key: String,
    pub atespace: String,
    pub name: String,
    pub deleted: bool,
    pub doc: String,
}

/// Which rows of a kind; in order of (atespace, name).
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Query {
    pub kind: Kind,
    pub atespace: Option<String>,
    /// Empty: all.
    pub states: Vec<i64>,
    /// Uid of the template.
    pub template: Option<String>,
    /// Only those a start has to look at.
    pub busy: bool,
    pub after: Option<(String, String)>,
    pub limit: usize,
}

impl Query {
    /// All of a kind.
    pub fn all(kind: Kind) -> Self {
        Self {
            kind,
            atespace: None,
            states: Vec::new(),
            template: None,
            busy: false,
            after: None,
            limit: 500,
        }
    }
}

/// Which events.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct EventQuery {
    pub atespace: Option<String>,
    pub subject: Option<String>,
    pub reason: Option<String>,
    pub after: u64,
    pub limit: usize,
}

/// What is kept.
#[derive(Debug, Clone, Copy)]
pub struct Trim {
    /// Revisions.
    pub changelog_keep: u64,
    /// Events.
    pub events_keep: u64,
    /// Request ids older than this are forgotten, unix ms.
    pub requests_before_ms: i64,
}

/// Why the store refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Someone else changed the row; read it again.
    #[error("{} {key:?} was changed meanwhile; try again", kind.as_str())]
    #[allow(missing_docs)]
    Conflict { kind: Kind, key: String },
    /// The key or name is taken.
    #[error("{} {atespace}/{name} exists already", kind.as_str())]
    #[allow(missing_docs)]
    Exists { kind: Kind, atespace: String, name: String },
    /// A precondition does not hold.
    #[error("{}", check_message(.0))]
    Check(Check),
    /// The changelog no longer reaches back so far.
    #[error("changes before revision {oldest} are no longer kept; start over from revision 0")]
    #[allow(missing_docs)]
    Compacted { oldest: u64 },
    /// A revision that was never given out here.
    #[error(
        "revision {asked} is not known, the latest is {latest}: the store was restored from a backup; start over from \
         revision 0"
    )]
    #[allow(missing_docs)]
    Unknown { asked: u64, latest: u64 },
    /// The database file cannot be used.
    #[error("{0}")]
    Unusable(String),
    /// A read or write failed.
    #[error("{0}")]
    Io(String),
}

fn check_message(check: &Check) -> String {
    match check {
        Check::Exists(kind, key) => format!("{} {key:?} does not exist (any more)", kind.as_str()),
        Check::TemplateUnused(_) => "actors still use the template; delete them first".to_owned(),
        Check::ActorsBelow(name, limit) => {
            format!("atespace {name:?} holds the {limit} actors that its quota allows")
        }
        Check::AtespaceEmpty(name) => {
            format!("atespace {name:?} still holds actors or templates; delete them first")
        }
    }
}

/// Held while blobs are deleted.
#[derive(Debug)]
pub struct DeletionPermit(
    #[allow(dead_code, reason = "ends with its owner")] Option<nix::fcntl::Flock<File>>,
);

/// Where records live.
#[async_trait::async_trait]
pub trait Store: Send + Sync + 'static {
    /// Applies a transaction durably.
    async fn commit(&self, tx: Tx) -> Result<Committed, StoreError>;
    /// A row by key.
    async fn get(&self, kind: Kind, key: &str) -> Result<Option<Object>, StoreError>;
    /// A row by name.
    async fn find(&self, kind: Kind, atespace: &str, name: &str) -> Result<Option<Object>, StoreError>;
    /// Rows in order of (atespace, name).
    async fn list(&self, query: &Query) -> Result<Vec<Object>, StoreError>;
    /// Up to `limit` changes after a revision, in order.
    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Change>, StoreError>;
    /// Events, oldest first: the first `limit` after a revision, or without one the newest `limit`.
    async fn events(&self, query: &EventQuery) -> Result<Vec<(u64, EventDraft)>, StoreError>;
    /// What a request id led to.
    async fn request(&self, id: &str) -> Result<Option<RequestRecord>, StoreError>;
    /// A sealed secret.
    async fn sealed(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError>;
    /// What is to be deleted, oldest first: id, last holder, item.
    async fn garbage(&self, limit: usize) -> Result<Vec<(i64, String, Garbage)>, StoreError>;
    /// What an atespace uses.
    async fn usage(&self, atespace: &str) -> Result<Usage, StoreError>;
    /// The latest committed revision, and a wake-up at each commit.
    fn revisions(&self) -> watch::Receiver<u64>;
    /// Leave to delete blobs; none while someone copies the store and then what it names (`backup`).
    fn deletion_permit(&self) -> Option<DeletionPermit> {
        Some(DeletionPermit(None))
    }
    /// Forgets what is beyond its bounds.
    async fn trim(&self, trim: Trim) -> Result<(), StoreError>;
    /// Ends it: later calls fail.
    async fn close(&self);
}

/// A store that everyone shares.
pub type SharedStore = Arc<dyn Store>;
