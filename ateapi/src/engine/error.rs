// SPDX-License-Identifier: Apache-2.0
//! What a call can fail with. `service::status` maps it to gRPC, in one place.
use std::time::Duration;

use super::QuotaExceeded;
use crate::egress::NameError;
use crate::model::{Invalid, SnapshotId, State};
use crate::schedule::NoWorker;
use crate::secrets::SecretError;
use crate::state::Refused;
use crate::store::StoreError;

/// Why a call failed. Cloned to every caller that waited for the same thing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// A field breaks its rule.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// There is no such thing.
    #[error("{kind} {name} does not exist")]
    #[allow(missing_docs)]
    NotFound { kind: &'static str, name: String },
    /// There is one already, and it is another.
    #[error("{0}")]
    Exists(String),
    /// Its state does not know that verb.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The actor or its template does not allow it.
    #[error("{message}")]
    #[allow(missing_docs)]
    Precondition { reason: &'static str, message: String, way_out: &'static str },
    /// It was to be stopped only if idle, and is not; or the node refused before it touched anything.
    #[error("{message}")]
    #[allow(missing_docs)]
    NotStopped { reason: String, message: String },
    /// The caller means an assignment that is not the present one.
    #[error("generation {asked} of actor {actor} is not its present one ({present})")]
    #[allow(missing_docs)]
    StaleGeneration { actor: String, asked: u64, present: u64 },
    /// No worker.
    #[error(transparent)]
    NoWorker(#[from] NoWorker),
    /// Its atespace may have no more.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// Its memory is beyond the caller's bound.
    #[error("actor {actor} holds {memory} bytes in memory, more than the {bound} that were allowed")]
    #[allow(missing_docs)]
    TooLarge { actor: String, memory: u64, bound: u64 },
    /// The work was done and failed; the record says the same.
    #[error("actor {actor} is {state}: {message}")]
    #[allow(missing_docs)]
    Failed { actor: String, state: State, reason: String, message: String, snapshot: Option<SnapshotId> },
    /// The node cannot be reached now.
    #[error("node {0} cannot be reached now; nothing was changed")]
    NodeUnreachable(String),
    /// Nothing proves yet that nothing runs there.
    #[error("the lease of node {node} may still run for {} s", left.as_secs() + 1)]
    #[allow(missing_docs)]
    LeaseRuns { node: String, left: Duration },
    /// A node refused or failed a call that changes no record.
    #[error("{what}: {message}")]
    #[allow(missing_docs)]
    Node { code: tonic::Code, what: String, message: String },
    /// Too much waits for this actor.
    #[error("{0} calls wait for this actor already")]
    Overloaded(usize),
    /// The same id was used for something else.
    #[error("request_id {0:?} was used for another request; draw a new one for each request")]
    RequestReused(String),
    /// A name without an address.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Sealing or opening secrets.
    #[error("{0}")]
    Secret(String),
    /// The control plane is ending.
    #[error("the control plane is stopping; call again when it is back")]
    Stopping,
}

impl From<SecretError> for CallError {
    fn from(error: SecretError) -> Self {
        Self::Secret(error.to_string())
    }
}

impl CallError {
    /// After which time the same call makes sense again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NoWorker(NoWorker::Full { being_freed: true, .. }) => Some(Duration::from_millis(200)),
            Self::LeaseRuns { left, .. } => Some(*left),
            Self::Quota(exceeded) => Some(exceeded.retry_after),
            Self::NoWorker(_)
            | Self::NodeUnreachable(_)
            | Self::Stopping
            | Self::Store(StoreError::Io(_)) => Some(Duration::from_secs(1)),
            Self::Overloaded(_) | Self::Store(StoreError::Conflict { .. }) => {
                Some(Duration::from_millis(100))
            }
            Self::NotStopped { .. } => Some(Duration::from_secs(5)),
            Self::Failed { state: State::Crashed | State::Exited, .. } => None,
            Self::Failed { .. } => Some(Duration::from_millis(500)),
            _ => None,
        }
    }
}
