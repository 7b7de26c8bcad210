// SPDX-License-Identifier: Apache-2.0
//! Snapshots: on the node's disk, and in the blob store.
//!
//! A snapshot is made in the order of promise P2: ateom's files and the volumes' archives → digests and
//! `record.json`, renamed into place ([`node`]) → one pack ([`pack`]) → the manifest ([`manifest`]). It is used only
//! after the check of promise P3: a node snapshot by its record's digest and its files ([`node`]), a durable one by
//! its manifest's digest and every block ([`restore`]). The format is specified in `docs/snapshot-format.md`.
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use tonic::Code;

use crate::blob::BlobError;

mod check;
#[cfg(test)]
mod corpus_tests;
pub mod digest;
mod keys;
pub mod manifest;
pub mod node;
pub mod pack;
pub mod record;
pub mod restore;
#[cfg(test)]
mod tests;
pub mod volume;

pub use check::{Checked, Checker};
pub use keys::{DataKey, FileKeyStore, KeyError, KeyStore, WrappedKey};

/// Where a snapshot's bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// This node's disk.
    Node,
    /// The blob store.
    Durable,
}

impl Source {
    /// As the contract spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Durable => "durable",
        }
    }
}

/// Why a snapshot cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is nowhere.
    #[error("snapshot {snapshot} is not {place}: resume from another snapshot, or reset the actor")]
    Missing {
        /// Its id.
        snapshot: String,
        /// Where it was looked for.
        place: String,
        /// Which copy.
        from: Source,
    },
    /// Its bytes are not those that were recorded.
    #[error("snapshot {snapshot}: {file} is corrupt: {reason}; it is not used")]
    Corrupt {
        /// Its id.
        snapshot: String,
        /// Which file, or `record`, `manifest`, `pack`.
        file: String,
        /// What was expected and found.
        reason: String,
        /// Which copy.
        from: Source,
    },
    /// It is another's, or another than the record says.
    #[error("snapshot {snapshot} is refused: {reason}")]
    Foreign {
        /// Its id.
        snapshot: String,
        /// What does not match.
        reason: String,
    },
    /// A format that this build does not read.
    #[error(
        "snapshot {snapshot} has format version {found}, this build reads {known}: use a newer substrate"
    )]
    Version {
        /// Its id.
        snapshot: String,
        /// In the file.
        found: u32,
        /// What is known.
        known: u32,
    },
    /// The place that would restore it lacks something.
    #[error("snapshot {snapshot} cannot be restored on worker {worker}: {reason}")]
    Incompatible {
        /// Its id.
        snapshot: String,
        /// Where.
        worker: String,
        /// The first thing that does not match.
        reason: String,
    },
    /// Another snapshot of this id exists.
    #[error("snapshot {snapshot} exists already, of {found}: choose another id")]
    Taken {
        /// Its id.
        snapshot: String,
        /// Generation and actor.
        found: String,
    },
    /// What ateom describes is not what is in the directory.
    #[error("snapshot {snapshot}: worker's description is wrong: {reason}")]
    Described {
        /// Its id.
        snapshot: String,
        /// What.
        reason: String,
    },
    /// A name that cannot be one.
    #[error("{what} {value:?} is not valid: letters, digits, '.', '_' and '-', at most 128")]
    BadName {
        /// Which field.
        what: &'static str,
        /// As given, shortened.
        value: String,
    },
    /// A key could not be had, or does not fit.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The blob store.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The system refused something.
    #[error("snapshot {snapshot}: {source}")]
    Io {
        /// Its id.
        snapshot: String,
        /// With action and path.
        source: io::Error,
    },
    /// A limit of the format.
    #[error("snapshot {snapshot}: {reason}")]
    TooLarge {
        /// Its id.
        snapshot: String,
        /// Which.
        reason: String,
    },
}

impl SnapshotError {
    pub(crate) fn io(snapshot: &str) -> impl FnOnce(io::Error) -> Self + use<> {
        let snapshot = snapshot.to_owned();
        move |source| Self::Io { snapshot, source }
    }

    pub(crate) fn code_and_reason(&self) -> (Code, &'static str) {
        match self {
            Self::Missing { .. } => (Code::DataLoss, "SNAPSHOT_MISSING"),
            Self::Corrupt { .. } => (Code::DataLoss, "SNAPSHOT_CORRUPT"),
            Self::Foreign { .. } => (Code::DataLoss, "SNAPSHOT_FOREIGN"),
            Self::Version { .. } => (Code::FailedPrecondition, "SNAPSHOT_VERSION"),
            Self::Incompatible { .. } => (Code::FailedPrecondition, "SNAPSHOT_INCOMPATIBLE"),
            Self::Taken { .. } => (Code::AlreadyExists, "SNAPSHOT_EXISTS"),
            Self::BadName { .. } => (Code::InvalidArgument, "INVALID_ARGUMENT"),
            Self::Described { .. } | Self::TooLarge { .. } => (Code::Internal, "SNAPSHOT"),
            Self::Key(KeyError::Mismatch { .. }) => (Code::DataLoss, "SNAPSHOT_KEY"),
            Self::Key(_) => (Code::Internal, "KEY"),
            Self::Blob(error) => error.code_and_reason(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                (Code::ResourceExhausted, "DISK_FULL")
            }
            Self::Io { .. } => (Code::Internal, "IO"),
        }
    }

    /// What the control plane falls back by: which file of which copy.
    pub(crate) fn metadata(&self, metadata: &mut HashMap<String, String>) {
        let mut put = |file: &str, from: Source| {
            metadata.insert("file".to_owned(), file.to_owned());
            metadata.insert("source".to_owned(), from.as_str().to_owned());
        };
        match self {
            Self::Missing { from: Source::Node, .. } => put("record", Source::Node),
            Self::Missing { from, .. } => put("manifest", *from),
            Self::Corrupt { file, from, .. } => put(file, *from),
            Self::Blob(BlobError::NotFound { key, .. } | BlobError::OutOfRange { key, .. }) => {
                put(key.as_str(), Source::Durable);
            }
            Self::Key(KeyError::Mismatch { .. }) | Self::Foreign { .. } => put("manifest", Source::Durable),
            _ => {}
        }
    }
}

/// What a file of a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// State of the runtime.
    State,
    /// Guest memory.
    Memory,
    /// Archive of one volume; the name is the volume's.
    Volume,
}

impl FileKind {
    /// Directory of a snapshot in which files of this kind are.
    pub fn directory(self) -> &'static str {
        match self {
            Self::State | Self::Memory => "files",
            Self::Volume => "volumes",
        }
    }

    /// Size of the blocks that a file of `size` bytes is cut into, bytes. Memory is dirtied page by page, and what a
    /// runtime writes of it moves by whole pages when something before it grows, so small memory has blocks of a page.
    /// Larger memory has larger ones up to 64 KiB, and any file more still beyond [`MAX_BLOCKS`], because the list of
    /// blocks is stored with each snapshot and held in memory (measurements: docs/snapshot-format.md).
    pub fn block_size(self, size: u64) -> u32 {
        let usual = match self {
            Self::Memory => {
                let page = MIN_BLOCK;
                (0..4).map(|times| page << times).find(|block| size.div_ceil((*block).into()) <= SMALL_BLOCKS)
            }
            Self::State | Self::Volume => Some(256 << 10),
        };
        let mut block: u32 = usual.unwrap_or(64 << 10);
        while block < MAX_BLOCK && size.div_ceil(u64::from(block)) > MAX_BLOCKS {
            block *= 2;
        }
        block
    }
}

/// Largest block, bytes.
pub(crate) const MAX_BLOCK: u32 = 4 << 20;
/// Smallest block, bytes.
pub(crate) const MIN_BLOCK: u32 = 4 << 10;
/// Blocks of memory up to which they are smaller than 64 KiB.
const SMALL_BLOCKS: u64 = 1 << 14;
/// Blocks of a file while they can still be made larger.
const MAX_BLOCKS: u64 = 1 << 17;

/// Checks an id that becomes part of a path and of an object's key.
pub(crate) fn check_name<'a>(what: &'static str, value: &'a str) -> Result<&'a str, SnapshotError> {
    let plain = (1..=128).contains(&value.len())
        && !value.starts_with('.')
        && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if plain {
        Ok(value)
    } else {
        Err(SnapshotError::BadName { what, value: value.chars().take(80).collect() })
    }
}

/// Path of a snapshot's file below its directory.
pub(crate) fn file_path(kind: FileKind, name: &str) -> PathBuf {
    PathBuf::from(kind.directory()).join(name)
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_millis() as i64)
}
