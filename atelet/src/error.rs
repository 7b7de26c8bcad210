// SPDX-License-Identifier: Apache-2.0
//! What can go wrong on a node, and the one place where it becomes a gRPC status.
//!
//! The codes are those of the head of `atelet.proto`, because the control plane acts on them: `ABORTED` for a
//! generation that is not the highest known, `DATA_LOSS` for a missing or corrupt snapshot, `FAILED_PRECONDITION` in
//! a checkpoint only while the sandbox is untouched. Each status carries a `google.rpc.ErrorInfo` (domain
//! `substrate`).
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use substrate_proto::types::Assignment;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::blob::BlobError;
use crate::disk::DiskLow;
use crate::image::ImageError;
use crate::snapshot::{KeyError, SnapshotError};

/// Why the node agent cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not usable.
    #[error("node agent configuration: {0}")]
    Config(String),
    /// The system refused something.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The socket could not be opened.
    #[error(transparent)]
    Listen(#[from] substrate_proto::seam::ListenError),
    /// The TCP listener could not be set up.
    #[error("the node agent's listener: {0}")]
    Tls(#[from] substrate_proto::tls::TlsError),
    /// Control groups are not usable.
    #[error(transparent)]
    Cgroup(#[from] ateom::cgroup::CgroupError),
    /// The keys cannot be read.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The image store cannot be opened.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// The sandbox config or an asset of it cannot be used.
    #[error(transparent)]
    Assets(#[from] crate::asset::AssetError),
    /// The blob store cannot be opened.
    #[error(transparent)]
    Blobs(#[from] BlobError),
    /// Another node agent runs on this directory.
    #[error("{0} is locked: another node agent runs on this directory; stop it or choose another --dir")]
    Locked(PathBuf),
    /// The gRPC server failed.
    #[error("serving {socket}: {source}")]
    Serve {
        /// The socket.
        socket: PathBuf,
        /// Its reason.
        source: tonic::transport::Error,
    },
    /// A worker did not end.
    #[error("worker {worker}: {reason}")]
    Worker {
        /// Its id.
        worker: String,
        /// What happened.
        reason: String,
    },
}

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A field of the request breaks a rule.
    #[error("{field}: {rule}")]
    Invalid {
        /// Path of the field.
        field: String,
        /// What it must be.
        rule: String,
    },
    /// A higher generation of the actor is known here (P1).
    #[error("generation {got} of actor {actor} is of the past: {known} is known on this node")]
    Stale {
        /// Name of the actor.
        actor: String,
        /// What the call was about.
        got: u64,
        /// The highest seen.
        known: u64,
    },
    /// This assignment has ended here; starting it again would be a second life.
    #[error(
        "generation {generation} of actor {actor} has ended on this node: assign it anew with a higher one"
    )]
    Ended {
        /// Name of the actor.
        actor: String,
        /// Which.
        generation: u64,
    },
    /// There is no such worker.
    #[error("this node has no worker {worker} (it has: {known})")]
    NoSuchWorker {
        /// As asked.
        worker: String,
        /// Those there are.
        known: String,
    },
    /// The worker's process is being started or fenced.
    #[error("worker {worker} is not ready: {reason}; try again or take another worker")]
    WorkerDown {
        /// Its id.
        worker: String,
        /// What it is doing.
        reason: String,
    },
    /// Another actor holds the slot.
    #[error("worker {worker} holds actor {holder}: release it first or take another worker")]
    SlotBusy {
        /// Its id.
        worker: String,
        /// `<atespace>/<actor> (generation)`.
        holder: String,
    },
    /// Nothing of the assignment runs here.
    #[error("actor {actor}, generation {generation}, does not run on worker {worker}: {found}")]
    NotRunning {
        /// Name of the actor.
        actor: String,
        /// Which.
        generation: u64,
        /// Where it was looked for.
        worker: String,
        /// What is there.
        found: String,
    },
    /// No lease covers a start.
    #[error(
        "no lease covers the start of an actor here: the control plane granted none that lasts longer; try again \
         once its session is up"
    )]
    NoLease,
    /// The disk is too full.
    #[error(transparent)]
    DiskLow(#[from] DiskLow),
    /// The runtime is revoked.
    #[error(
        "{}runtime {runtime} is revoked by {}: {}",
        match snapshot { Some(id) => format!("snapshot {id} of {actor} is not restored, its "), None => String::new() },
        file.display(),
        match snapshot {
            Some(_) => "`reset` boots the actor afresh (volumes kept, memory lost), or an administrator lets it pass \
                        once more with [[overrides]] there",
            None => "put another one first in [[gvisor.runtimes]] there and start the node again",
        }
    )]
    RuntimeRevoked {
        /// Name of the actor.
        actor: String,
        /// What was to be restored; none for a boot.
        snapshot: Option<String>,
        /// Its sha256.
        runtime: String,
        /// The sandbox config.
        file: PathBuf,
    },
    /// The snapshot is older than the sandbox config allows.
    #[error(
        "snapshot {snapshot} of {actor} is not restored: it is {days} days old, {} allows {max_days}; `reset` boots the \
         actor afresh (volumes kept, memory lost), or an administrator lets it pass once more with [[overrides]] there",
        file.display()
    )]
    SnapshotTooOld {
        /// Name of the actor.
        actor: String,
        /// Which.
        snapshot: String,
        /// Its age.
        days: u64,
        /// Allowed.
        max_days: u32,
        /// The sandbox config.
        file: PathBuf,
    },
    /// A checkpoint was refused before anything was touched.
    #[error("{0}")]
    CheckpointRefused(String),
    /// The call was overtaken by Release or by a higher generation.
    #[error("the start of actor {actor}, generation {generation}, was ended by {by}")]
    Superseded {
        /// Name of the actor.
        actor: String,
        /// Which.
        generation: u64,
        /// By what.
        by: &'static str,
    },
    /// A snapshot cannot be used or made.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A key cannot be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An image cannot be had.
    #[error("{}{source}", if container.is_empty() { String::new() } else { format!("container {container}: ") })]
    Image {
        /// Whose image; empty outside an activation.
        container: String,
        /// Why.
        source: ImageError,
    },
    /// The ateom answered so; in the words of the node's contract.
    #[error("worker {worker}: {message}")]
    Ateom {
        /// Which.
        worker: String,
        /// Of the node's contract.
        code: Code,
        /// For machines.
        reason: String,
        /// For people.
        message: String,
        /// For machines.
        metadata: HashMap<String, String>,
    },
    /// Sent in a session that is over, or before this one has begun here.
    #[error("the call was sent in another session of the control plane than the one that stands; call again")]
    OtherSession,
    /// The worker died under the call and is fenced.
    #[error("worker {worker} was lost during {during}: {reason}")]
    WorkerLost {
        /// Which.
        worker: String,
        /// The call.
        during: &'static str,
        /// How it ended.
        reason: String,
    },
    /// The system refused something.
    #[error("{what}: {source}")]
    Io {
        /// For what.
        what: String,
        /// The system's reason, with the path.
        source: io::Error,
    },
}

impl NodeError {
    /// An [`NodeError::Invalid`].
    pub fn invalid(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), rule: rule.into() }
    }

    /// Adds to a system error what it was for.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    fn code_and_reason(&self) -> (Code, &str) {
        match self {
            Self::Invalid { .. } => (Code::InvalidArgument, "INVALID_ARGUMENT"),
            Self::Stale { .. } => (Code::Aborted, "STALE_GENERATION"),
            Self::Ended { .. } => (Code::Aborted, "GENERATION_ENDED"),
            Self::Superseded { .. } => (Code::Aborted, "SUPERSEDED"),
            // Not UNAVAILABLE: the same call would be sent again for ever.
            Self::NoSuchWorker { .. } => (Code::ResourceExhausted, "NO_SUCH_WORKER"),
            Self::WorkerDown { .. } => (Code::Unavailable, "WORKER_DOWN"),
            Self::SlotBusy { .. } => (Code::ResourceExhausted, "SLOT_BUSY"),
            Self::NotRunning { .. } => (Code::NotFound, "NOT_RUNNING"),
            Self::NoLease => (Code::Unavailable, "NO_LEASE"),
            Self::DiskLow(_) => (Code::ResourceExhausted, "DISK_LOW"),
            Self::CheckpointRefused(_) => (Code::FailedPrecondition, "REFUSED"),
            // Neither is for good: the snapshot is whole, and the file may change.
            Self::RuntimeRevoked { .. } => (Code::PermissionDenied, "RUNTIME_REVOKED"),
            Self::SnapshotTooOld { .. } => (Code::PermissionDenied, "SNAPSHOT_TOO_OLD"),
            Self::Snapshot(error) => error.code_and_reason(),
            Self::Blob(error) => error.code_and_reason(),
            Self::Key(_) => (Code::Internal, "KEY"),
            Self::Image { source, .. } => image_code(source),
            Self::Ateom { code, reason, .. } => (*code, reason),
            Self::OtherSession => (Code::Unavailable, "OTHER_SESSION"),
            Self::WorkerLost { .. } => (Code::Internal, "WORKER_LOST"),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                (Code::ResourceExhausted, "DISK_FULL")
            }
            Self::Io { .. } => (Code::Internal, "IO"),
        }
    }
}

fn image_code(error: &ImageError) -> (Code, &'static str) {
    match error {
        ImageError::BadReference { .. } | ImageError::BadDigest { .. } | ImageError::Unpinned { .. } => {
            (Code::InvalidArgument, "IMAGE_REFERENCE")
        }
        ImageError::OutsideRoots { .. } | ImageError::Denied { .. } => {
            (Code::FailedPrecondition, "IMAGE_DENIED")
        }
        ImageError::NotFound { .. } => (Code::NotFound, "IMAGE_NOT_FOUND"),
        ImageError::RateLimited { .. }
        | ImageError::Unreachable { .. }
        | ImageError::Registry { .. }
        | ImageError::TimedOut { .. } => (Code::Unavailable, "REGISTRY"),
        ImageError::Corrupt { .. }
        | ImageError::Platform { .. }
        | ImageError::Unsupported { .. }
        | ImageError::Refused { .. }
        | ImageError::TooLarge { .. }
        | ImageError::NoUser { .. } => (Code::FailedPrecondition, "IMAGE_UNUSABLE"),
        _ => (Code::Internal, "IMAGE"),
    }
}

impl From<NodeError> for Status {
    fn from(error: NodeError) -> Self {
        let (code, reason) = error.code_and_reason();
        let mut metadata = HashMap::new();
        match &error {
            NodeError::Ateom { metadata: theirs, .. } => metadata.clone_from(theirs),
            NodeError::Snapshot(inner) => inner.metadata(&mut metadata),
            NodeError::Invalid { field, .. } => drop(metadata.insert("field".to_owned(), field.clone())),
            NodeError::Image { container, .. } if !container.is_empty() => {
                metadata.insert("container".to_owned(), container.clone());
            }
            _ => {}
        }
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, "substrate", metadata);
        Status::with_error_details(code, error.to_string(), details)
    }
}

/// `<atespace>/<actor>` of an assignment, for messages.
pub(crate) fn actor_name(assignment: &Assignment) -> String {
    format!("{}/{}", assignment.atespace, assignment.actor_name)
}
