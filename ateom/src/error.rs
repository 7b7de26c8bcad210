// SPDX-License-Identifier: Apache-2.0
//! What a slot answers when it cannot do what was asked, and the one place that makes gRPC statuses of it.
use substrate_proto::types::ExitStatus;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Domain of the machine-readable reasons.
pub const DOMAIN: &str = "ateom.substrate";

/// Why a call was refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// A lower generation than one already seen of this actor.
    #[error("generation {asked} of actor {actor} is stale: {known} is known here")]
    Stale {
        /// Uid.
        actor: String,
        /// Of the call.
        asked: u64,
        /// The highest seen.
        known: u64,
    },
    /// This copy has run here and is gone.
    #[error("generation {generation} of actor {actor} has ended here: a new start needs a higher one")]
    Ended {
        /// Uid.
        actor: String,
        /// Of the call.
        generation: u64,
    },
    /// Another actor, or another generation of this one, is in the slot.
    #[error("the slot is taken by actor {actor} generation {generation} ({phase}); terminate it first")]
    Occupied {
        /// Uid of the occupant.
        actor: String,
        /// Its generation.
        generation: u64,
        /// What it does.
        phase: String,
    },
    /// The actor is not in this slot.
    #[error("actor {actor} generation {generation} is not in this slot")]
    NotHere {
        /// Uid.
        actor: String,
        /// Of the call.
        generation: u64,
    },
    /// The actor is here, but not in a state for this.
    #[error("actor {actor} is {phase}: {hint}")]
    NotNow {
        /// Uid.
        actor: String,
        /// What it does.
        phase: String,
        /// What to do.
        hint: String,
    },
    /// A checkpoint that is only wanted when idle, and something is live.
    #[error("the actor is not idle: {0}")]
    Busy(String),
    /// The lease has passed.
    #[error("the lease of actor {0} has expired: renew it first")]
    LeaseExpired(String),
    /// The snapshot needs something else than what is here.
    #[error("the snapshot cannot be restored here: {field} is {here:?} here and {needed:?} in the snapshot")]
    Incompatible {
        /// Which fact.
        field: String,
        /// This slot's.
        here: String,
        /// The snapshot's.
        needed: String,
    },
    /// Refused before anything was touched; `reason` is machine-readable.
    #[error("{message}")]
    Refused {
        /// UPPER_SNAKE_CASE.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Starting or restoring failed; nothing runs.
    #[error("{0}")]
    StartFailed(String),
    /// It runs but did not become ready in time; it was ended.
    #[error("{0}")]
    NotReady(String),
    /// The workload ended by itself.
    #[error("the workload ended with code {} before this was done", .0.code)]
    WorkloadExited(ExitStatus),
    /// The sandbox is gone, and the actor's memory with it.
    #[error("{0}")]
    SandboxLost(String),
    /// It was ended meanwhile by Terminate.
    #[error("the actor was terminated meanwhile")]
    Terminated,
    /// The slot itself is broken.
    #[error("the slot is broken: {0}")]
    Broken(String),
}

impl SlotError {
    /// The machine-readable reason, as in `google.rpc.ErrorInfo`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID",
            Self::Stale { .. } | Self::Ended { .. } => "STALE_GENERATION",
            Self::Occupied { .. } => "OCCUPIED",
            Self::NotHere { .. } => "NOT_HERE",
            Self::NotNow { .. } => "NOT_NOW",
            Self::Busy(_) => "NOT_IDLE",
            Self::LeaseExpired(_) => "LEASE_EXPIRED",
            Self::Incompatible { .. } => "INCOMPATIBLE",
            Self::Refused { reason, .. } => reason,
            Self::StartFailed(_) => "START_FAILED",
            Self::NotReady(_) => "NOT_READY",
            Self::WorkloadExited(_) => "WORKLOAD_EXITED",
            Self::SandboxLost(_) => "SANDBOX_LOST",
            Self::Terminated => "TERMINATED",
            Self::Broken(_) => "SLOT_BROKEN",
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            // Refused before anything was touched: the contract of FAILED_PRECONDITION.
            Self::Stale { .. }
            | Self::Ended { .. }
            | Self::Occupied { .. }
            | Self::NotHere { .. }
            | Self::NotNow { .. }
            | Self::Busy(_)
            | Self::LeaseExpired(_)
            | Self::Incompatible { .. }
            | Self::Refused { .. } => Code::FailedPrecondition,
            Self::StartFailed(_) | Self::Broken(_) => Code::Internal,
            Self::NotReady(_) => Code::DeadlineExceeded,
            Self::WorkloadExited(_) | Self::Terminated => Code::Aborted,
            Self::SandboxLost(_) => Code::DataLoss,
        }
    }
}

impl From<SlotError> for Status {
    fn from(error: SlotError) -> Self {
        let mut metadata = std::collections::HashMap::new();
        if let SlotError::WorkloadExited(exit) = &error {
            metadata.insert("code".to_owned(), exit.code.to_string());
            metadata.insert("container".to_owned(), exit.container.clone());
        }
        if let SlotError::Incompatible { field, .. } = &error {
            metadata.insert("field".to_owned(), field.clone());
        }
        let details = ErrorDetails::with_error_info(error.reason(), DOMAIN, metadata);
        Status::with_error_details(error.code(), error.to_string(), details)
    }
}
