// SPDX-License-Identifier: Apache-2.0
//! Errors to gRPC statuses, in one place: code, `google.rpc.ErrorInfo` (domain "substrate") and `RetryInfo`.
use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::egress::NameError;
use crate::engine::CallError;
use crate::model::State;
use crate::schedule::NoWorker;
use crate::state::way_out;
use crate::store::{Check, StoreError};

/// The status of an error.
pub(crate) fn status(error: &CallError) -> Status {
    let (code, reason) = code_and_reason(error);
    let mut metadata = HashMap::new();
    let mut put = |key: &str, value: &str| {
        if !value.is_empty() {
            metadata.insert(key.to_owned(), value.to_owned());
        }
    };
    match error {
        CallError::Invalid(invalid) => put("field", &invalid.field),
        CallError::NotFound { kind, name } => put(kind, name),
        CallError::Refused(refused) => {
            put("state", refused.state.as_str());
            put("way_out", refused.way_out);
        }
        CallError::Precondition { way_out, .. } => put("way_out", way_out),
        CallError::Failed { actor, state, snapshot, .. } => {
            put("actor", actor);
            put("state", state.as_str());
            put("snapshot", snapshot.as_ref().map_or("", |id| id.as_str()));
            put("way_out", way_out(*state));
        }
        CallError::StaleGeneration { actor, .. } => {
            put("actor", actor);
            put("way_out", "read the actor again and use its generation");
        }
        CallError::TooLarge { actor, memory, .. } => {
            put("actor", actor);
            put("memory_bytes", &memory.to_string());
            put("way_out", "raise maxHeap or use onReply: async");
        }
        CallError::NoWorker(NoWorker::Full { pool, .. }) => {
            put("pool", pool);
            put("way_out", "suspend or delete an actor, add workers, or call again");
        }
        CallError::NodeUnreachable(node) => put("node", node),
        CallError::LeaseRuns { node, .. } => {
            put("node", node);
            put("way_out", "call again when it has ended; nothing can be lost by waiting");
        }
        CallError::Quota(exceeded) => {
            put("atespace", &exceeded.atespace);
            put("quota", exceeded.quota);
            put("used", &exceeded.used.to_string());
            put("limit", &exceeded.limit.to_string());
            put("way_out", exceeded.way_out());
        }
        _ => {}
    }
    let mut details = ErrorDetails::with_error_info(reason, "substrate", metadata);
    if let CallError::Invalid(invalid) = error {
        details.add_bad_request_violation(&invalid.field, &invalid.message);
    }
    if let Some(after) = error.retry_after() {
        details.set_retry_info(Some(after));
    }
    let message = match error {
        CallError::Refused(refused) => format!("{refused}; {}", refused.way_out),
        CallError::Precondition { message, way_out, .. } => format!("{message}; {way_out}"),
        CallError::Failed { state, .. } => format!("{error}; {}", way_out(*state)),
        other => other.to_string(),
    };
    Status::with_error_details(code, message, details)
}

fn code_and_reason(error: &CallError) -> (Code, String) {
    let (code, reason) = match error {
        CallError::Invalid(_) | CallError::Name(NameError::Malformed(_)) => {
            (Code::InvalidArgument, "INVALID_FIELD")
        }
        CallError::NotFound { kind, .. } => {
            return (Code::NotFound, format!("{}_NOT_FOUND", kind.to_uppercase()));
        }
        CallError::Exists(_) | CallError::Store(StoreError::Exists { .. }) => {
            (Code::AlreadyExists, "ALREADY_EXISTS")
        }
        CallError::Refused(refused) => (Code::FailedPrecondition, refused.reason),
        CallError::Precondition { reason, .. } => (Code::FailedPrecondition, *reason),
        CallError::NotStopped { reason, .. } => return (Code::FailedPrecondition, reason.clone()),
        CallError::StaleGeneration { .. } => (Code::Aborted, "STALE_GENERATION"),
        CallError::NoWorker(NoWorker::Full { .. }) => (Code::ResourceExhausted, "WORKER_POOL_FULL"),
        CallError::NoWorker(NoWorker::None(_)) => (Code::Unavailable, "NO_WORKER"),
        CallError::LeaseRuns { .. } => (Code::FailedPrecondition, "LEASE_RUNS"),
        CallError::Quota(_) => (Code::ResourceExhausted, "QUOTA_EXCEEDED"),
        CallError::TooLarge { .. } => (Code::ResourceExhausted, "HEAP_TOO_LARGE"),
        CallError::Failed { state, reason, .. } => {
            let code = match state {
                State::Crashed | State::Exited => Code::FailedPrecondition,
                _ => Code::Unavailable,
            };
            return (code, if reason.is_empty() { "FAILED".to_owned() } else { reason.clone() });
        }
        CallError::NodeUnreachable(_) => (Code::Unavailable, "NODE_UNREACHABLE"),
        CallError::Node { code, .. } => (*code, "NODE_REFUSED"),
        CallError::Overloaded(_) => (Code::ResourceExhausted, "TOO_MANY_CALLS"),
        CallError::RequestReused(_) => (Code::InvalidArgument, "REQUEST_ID_REUSED"),
        CallError::Name(NameError::Denied(_)) => (Code::PermissionDenied, "NAME_DENIED"),
        CallError::Name(NameError::Full) => (Code::ResourceExhausted, "TOO_MANY_NAMES"),
        CallError::Store(StoreError::Conflict { .. }) => (Code::Aborted, "CONFLICT"),
        CallError::Store(StoreError::Check(Check::Exists(..))) => (Code::NotFound, "NOT_FOUND"),
        CallError::Store(StoreError::Check(_)) => (Code::FailedPrecondition, "IN_USE"),
        CallError::Store(StoreError::Compacted { .. }) => (Code::OutOfRange, "REVISION_TOO_OLD"),
        CallError::Store(StoreError::Unknown { .. }) => (Code::OutOfRange, "REVISION_UNKNOWN"),
        CallError::Store(StoreError::Unusable(_)) => (Code::Internal, "STORE_UNUSABLE"),
        CallError::Store(StoreError::Io(_)) => (Code::Unavailable, "STORE_FAILED"),
        CallError::Secret(_) => (Code::Internal, "SECRET_FAILED"),
        CallError::Stopping => (Code::Unavailable, "STOPPING"),
    };
    (code, reason.to_owned())
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        status(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_say_reason_state_and_way_out() {
        let error = CallError::Failed {
            actor: "a/b".into(),
            state: State::Crashed,
            reason: "SNAPSHOT_CORRUPT".into(),
            message: "pages.img".into(),
            snapshot: Some("s-1".into()),
        };
        let status = status(&error);
        assert_eq!(status.code(), Code::FailedPrecondition);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("SNAPSHOT_CORRUPT", "substrate"));
        for (key, value) in [("actor", "a/b"), ("state", "CRASHED"), ("snapshot", "s-1")] {
            assert_eq!(info.metadata.get(key).map(String::as_str), Some(value));
        }
        assert!(info.metadata["way_out"].contains("reset"));
        assert!(details.retry_info().is_none());
    }

    #[test]
    fn a_full_pool_is_resource_exhausted_with_a_retry_hint() {
        let full = NoWorker::Full { pool: "default".into(), workers: 4, being_freed: true };
        let status = status(&full.into());
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.get_error_details().retry_info().is_some());
    }
}
