// SPDX-License-Identifier: Apache-2.0
//! Backup and restore of what cannot be made again: the database, the key files, the blob store.
//!
//! **Layout**, as a directory or as one tar archive, the index last:
//! ```text
//! control/state.db     the database, as one transaction saw it
//! blobs/…              every object of the local blob store; of a bucket those that records name
//! keys/…               key files, unless they were left out
//! backup.json          what is here, with size and SHA-256 of each; a backup without it is not one
//! ```
//!
//! **Consistency.** The database is copied first, by SQLite from one read transaction (`VACUUM INTO`), also while a
//! control plane writes to it. Objects of the blob store never change and are there before the record that names them
//! (P2), so whatever the copy names exists when the objects are copied after it, as long as none is deleted
//! meanwhile: the backup holds a lock (`<database>.copying`, shared) and the collector deletes only under the same
//! lock (exclusive). Both end with their process. Everything that the copied records name is checked to be there.
//!
//! **What is in it** is every actor at its last durable snapshot, as a crash of the machine would leave it: an actor
//! that ran goes back there when it is restored, with an event that says so (P4); one that only has a node snapshot
//! has none here. The index names both kinds.
//!
//! **Restore** unpacks into `DIR/.restore`, checks every digest, the database's integrity and schema and that the keys
//! open it, and only then moves the parts into place, the database last. A directory that holds anything is refused;
//! an interrupted restore leaves `.restore` behind and no database.
mod files;
mod restore;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use restore::restore;

use crate::model::{Actor, State};
use crate::store::{Garbage, StoreError};

/// Version of the layout.
const FORMAT: u32 = 1;
const INDEX: &str = "backup.json";
const DATABASE: &str = "control/state.db";
/// Where a restore works before anything is in place.
pub const STAGING: &str = ".restore";
/// How long a backup waits for a collection in progress.
const COLLECTION: Duration = Duration::from_mins(2);

/// Why a backup could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file or directory.
    #[error("cannot {doing} {}: {source}", path.display())]
    #[allow(missing_docs)]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    /// There is something where it should go.
    #[error("{} is not empty: {way_out}", path.display())]
    #[allow(missing_docs)]
    NotEmpty { path: PathBuf, way_out: &'static str },
    /// There is nothing to back up.
    #[error("{} holds no database of a control plane: is this its directory?", .0.display())]
    NoDatabase(PathBuf),
    /// Not a backup, or not a whole one.
    #[error("{} is no complete backup: {reason}", path.display())]
    #[allow(missing_docs)]
    Incomplete { path: PathBuf, reason: String },
    /// A file is not what the index says.
    #[error("{file} in the backup is damaged: {reason}; take another backup")]
    #[allow(missing_docs)]
    Damaged { file: String, reason: String },
    /// Written by a newer version.
    #[error(
        "the backup is of a newer substrate ({what} {found}, this version knows {known}): restore it with that one"
    )]
    #[allow(missing_docs)]
    Newer { what: &'static str, found: i64, known: i64 },
    /// Keys are needed.
    #[error(
        "the backup holds no keys, and without them none of its snapshots can be opened: name the directory of the \
         keys that belong to it"
    )]
    NoKeys,
    /// The keys do not fit.
    #[error("the keys do not belong to this backup: {0}")]
    WrongKeys(String),
    /// The collector did not let go.
    #[error("blobs are still being deleted after {} s: try again", .0.as_secs())]
    Collecting(Duration),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The work was cut off.
    #[error("the backup was cut off: {0}")]
    CutOff(String),
}

fn at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackupError + use<> {
    let path = path.to_owned();
    move |source| BackupError::Io { doing, path, source }
}

/// What is backed up.
#[derive(Debug, Clone)]
pub struct Source {
    /// The SQLite database.
    pub database: PathBuf,
    /// Where the snapshots are.
    pub blobs: Blobs,
    /// Directory of key files; none: they are left out, and have to be kept elsewhere.
    pub keys: Option<PathBuf>,
}

/// A blob store that is backed up.
#[derive(Debug, Clone)]
pub enum Blobs {
    /// A directory: all that is in it.
    Directory(PathBuf),
    /// Any other: what records name.
    Objects(Arc<dyn Objects>),
}

/// Objects of a blob store that is no directory. Its methods block.
pub trait Objects: Send + Sync + std::fmt::Debug {
    /// Bytes of an object, `None` when there is none.
    ///
    /// # Errors
    /// When the store does not answer.
    fn size(&self, key: &str) -> io::Result<Option<u64>>;
    /// A range of one.
    ///
    /// # Errors
    /// Likewise, or when there is not so much of it.
    fn read(&self, key: &str, range: std::ops::Range<u64>) -> io::Result<Vec<u8>>;
}

/// Where to.
#[derive(Debug, Clone)]
pub enum Target {
    /// A directory, absent or empty.
    Directory(PathBuf),
    /// A tar archive, absent.
    Archive(PathBuf),
}

/// One file of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Its place in the backup.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Hex.
    pub sha256: String,
}

/// The index, written last.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Version of the layout.
    pub format: u32,
    /// Version of substrate that wrote it.
    pub version: String,
    /// When the database was copied, unix ms.
    pub created_ms: i64,
    /// Schema of the database.
    pub schema: i64,
    /// Actors in it.
    pub actors: u64,
    /// Key files are in it.
    pub has_keys: bool,
    /// SHA-256 of the runtime binaries its snapshots can be restored with.
    pub runtimes: BTreeSet<String>,
    /// Actors (atespace/name) that were awake or changing: they are in it at their last durable snapshot.
    pub awake: Vec<String>,
    /// Actors whose memory is only on the node, or that have never been snapshotted: it is not in the backup.
    pub without_snapshot: Vec<String>,
    /// Objects that a record names and the blob store has not (path and actor): should be empty.
    pub missing: Vec<String>,
    /// Everything in it but itself.
    pub files: Vec<Entry>,
}

impl Index {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

/// Told how far it is: bytes done, bytes known to be there.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Send + Sync);

/// Lock beside a database: shared while someone copies it and what it names, exclusive while blobs are deleted.
pub(crate) fn copying_lock(database: &Path) -> PathBuf {
    database.with_extension("copying")
}

/// Opens the lock's file.
pub(crate) fn open_lock(database: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    File::options().write(true).create(true).truncate(false).mode(0o600).open(copying_lock(database))
}

/// Waits until no blobs are being deleted, and keeps it so.
async fn hold_collection(database: &Path) -> Result<nix::fcntl::Flock<File>, BackupError> {
    let mut file = open_lock(database).map_err(at("open", &copying_lock(database)))?;
    let deadline = tokio::time::Instant::now() + COLLECTION;
    loop {
        match nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockSharedNonblock) {
            Ok(held) => return Ok(held),
            Err((_, error)) if error != nix::errno::Errno::EWOULDBLOCK => {
                return Err(at("lock", &copying_lock(database))(error.into()));
            }
            Err(_) if tokio::time::Instant::now() > deadline => {
                return Err(BackupError::Collecting(COLLECTION));
            }
            // The other side is another process, which flock(2) can only be asked about.
            Err((back, _)) => file = back,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What the records of a copied database say.
#[derive(Default)]
struct Inventory {
    actors: u64,
    runtimes: BTreeSet<String>,
    awake: Vec<String>,
    without_snapshot: Vec<String>,
    /// Place in the blob store and who names it.
    named: Vec<(String, String)>,
}

impl Inventory {
    fn add(&mut self, actor: &Actor) {
        let label = format!("{}/{}", actor.atespace, actor.name);
        self.actors += 1;
        self.runtimes.extend(
            actor
                .snapshots
                .iter()
                .filter(|it| it.is_durable())
                .map(|it| it.compatibility.runtime_digest.clone()),
        );
        let is_awake =
            matches!(actor.state, State::Resuming | State::Running | State::Suspending | State::Pausing);
        let has_one = actor.snapshots.iter().any(crate::model::Snapshot::is_durable);
        if !has_one && actor.state != State::New && actor.state != State::Deleting {
            self.without_snapshot.push(label);
        } else if is_awake {
            self.awake.push(label);
        }
    }

    fn name(&mut self, holder: String, blob: Garbage) {
        let place = match blob {
            Garbage::Manifest { actor, directory } => format!("actors/{actor}/{directory}/manifest"),
            Garbage::Pack { key } => key,
            Garbage::NodeCopy { .. } | Garbage::Purge { .. } => return,
        };
        self.named.push((place, holder));
    }
}

/// Makes a backup. Also of a directory that a control plane works on.
pub async fn create(source: &Source, target: &Target, progress: Progress<'_>) -> Result<Index, BackupError> {
    if !source.database.exists() {
        return Err(BackupError::NoDatabase(source.database.clone()));
    }
    let _no_deletions = hold_collection(&source.database).await?;
    let mut sink = files::Sink::create(target)?;
    let copy = sink.place_for_database()?;
    let created_ms = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as i64);
    crate::store::copy_database(&source.database, &copy).await?;
    let schema = crate::store::schema_of(&copy).await?;
    let mut inventory = Inventory::default();
    crate::store::read_copy(&copy, &mut |record| match record {
        crate::store::Copied::Actor(actor) => inventory.add(&actor),
        crate::store::Copied::Blob { holder, blob } => inventory.name(holder, blob),
    })
    .await?;

    let mut plan = Vec::new();
    match &source.blobs {
        Blobs::Directory(dir) => files::list(dir, "blobs", &mut plan)?,
        Blobs::Objects(objects) => {
            let places: BTreeSet<&str> = inventory.named.iter().map(|(place, _)| place.as_str()).collect();
            tokio::task::block_in_place(|| files::list_objects(objects, &places, "blobs", &mut plan))?;
        }
    }
    if let Some(keys) = &source.keys {
        files::list(keys, "keys", &mut plan)?;
    }
    let size = std::fs::metadata(&copy).map_err(at("read", &copy))?.len();
    let total = size + plan.iter().map(|file| file.size).sum::<u64>();
    let done = tokio::task::block_in_place(|| -> Result<Vec<Entry>, BackupError> {
        let mut sum = 0;
        let mut told = |bytes: u64| {
            sum += bytes;
            progress(sum, total.max(sum));
        };
        let mut entries = vec![sink.add_database(&copy, &mut told)?];
        for file in &plan {
            entries.extend(sink.add(file, &mut told)?);
        }
        Ok(entries)
    })?;
    let have: BTreeSet<&str> = done.iter().filter_map(|entry| entry.path.strip_prefix("blobs/")).collect();
    let missing = inventory
        .named
        .iter()
        .filter(|(place, _)| !have.contains(place.as_str()))
        .map(|(place, holder)| format!("{place} (of {holder})"))
        .collect();
    let index = Index {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        created_ms,
        schema,
        actors: inventory.actors,
        has_keys: source.keys.is_some(),
        runtimes: inventory.runtimes,
        awake: inventory.awake,
        without_snapshot: inventory.without_snapshot,
        missing,
        files: done,
    };
    sink.finish(&index)?;
    Ok(index)
}
