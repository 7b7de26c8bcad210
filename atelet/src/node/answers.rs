// SPDX-License-Identifier: Apache-2.0
//! What an ateom's answer means in the node's contract (head of `atelet.proto`). Pure.
//!
//! The two contracts use the same codes for different things: DEADLINE_EXCEEDED of an ateom is a workload that did not
//! become ready, of a node an unknown outcome; DATA_LOSS of an ateom is a dead sandbox, of a node a corrupt snapshot.
//! So codes are chosen by the machine-readable reason where there is one.
use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::error::NodeError;

fn info(status: &Status) -> (String, HashMap<String, String>) {
    status.get_details_error_info().map_or_else(Default::default, |info| (info.reason, info.metadata))
}

fn answer(
    worker: &str,
    status: &Status,
    code: Code,
    reason: &str,
    metadata: HashMap<String, String>,
) -> NodeError {
    NodeError::Ateom {
        worker: worker.to_owned(),
        code,
        reason: reason.to_owned(),
        message: status.message().to_owned(),
        metadata,
    }
}

fn exit(mut metadata: HashMap<String, String>) -> HashMap<String, String> {
    let code = metadata.get("code").and_then(|code| code.parse().ok()).unwrap_or(0);
    let signal = if code > 128 { code - 128 } else { 0 };
    metadata.entry("signal".to_owned()).or_insert_with(|| signal.to_string());
    metadata
}

/// Of Run and Restore. Nothing runs afterwards.
pub(super) fn start(worker: &str, status: &Status) -> NodeError {
    let (reason, metadata) = info(status);
    let (code, reason) = match reason.as_str() {
        "STALE_GENERATION" => (Code::Aborted, "STALE_GENERATION"),
        "TERMINATED" => (Code::Aborted, "SUPERSEDED"),
        "WORKLOAD_EXITED" | "EXITED" => {
            return answer(worker, status, Code::FailedPrecondition, "EXITED", exit(metadata));
        }
        "OCCUPIED" => (Code::ResourceExhausted, "SLOT_BUSY"),
        "LEASE_EXPIRED" => (Code::Unavailable, "NO_LEASE"),
        "NOT_READY" => (Code::Internal, "NOT_READY"),
        "" => match status.code() {
            // Those that would be read as something else.
            Code::Aborted | Code::DataLoss | Code::DeadlineExceeded => (Code::Internal, "START_FAILED"),
            code => (code, "ATEOM"),
        },
        other => match status.code() {
            Code::Aborted | Code::DataLoss | Code::DeadlineExceeded => (Code::Internal, other),
            code => (code, other),
        },
    };
    answer(worker, status, code, reason, metadata)
}

/// Of Checkpoint. FAILED_PRECONDITION must mean that the actor goes on running.
pub(super) fn checkpoint(worker: &str, status: &Status) -> NodeError {
    let (reason, metadata) = info(status);
    let (code, reason) = match reason.as_str() {
        "STALE_GENERATION" => (Code::Aborted, "STALE_GENERATION"),
        "NOT_HERE" => (Code::NotFound, "NOT_RUNNING"),
        "WORKLOAD_EXITED" | "EXITED" => {
            return answer(worker, status, Code::NotFound, "EXITED", exit(metadata));
        }
        "TERMINATED" => (Code::NotFound, "TERMINATED"),
        "NOT_IDLE" | "BUSY" => (Code::FailedPrecondition, "BUSY"),
        "" => (status.code(), "ATEOM"),
        other => (status.code(), other),
    };
    answer(worker, status, code, reason, metadata)
}

/// Of anything else.
pub(super) fn other(worker: &str, status: &Status) -> NodeError {
    let (reason, metadata) = info(status);
    let (code, reason) = match reason.as_str() {
        "STALE_GENERATION" => (Code::Aborted, "STALE_GENERATION"),
        "NOT_HERE" => (Code::NotFound, "NOT_RUNNING"),
        "" => (status.code(), "ATEOM"),
        other => (status.code(), other),
    };
    answer(worker, status, code, reason, metadata)
}

/// Whether the call may not have come through at all, so that the worker has to be looked at.
pub(super) fn is_transport(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
        && status.get_details_error_info().is_none()
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn status(code: Code, reason: &str, metadata: &[(&str, &str)]) -> Status {
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        if reason.is_empty() {
            return Status::new(code, "m");
        }
        Status::with_error_details(code, "m", ErrorDetails::with_error_info(reason, "d", metadata))
    }

    #[test]
    fn starts() {
        for (code, reason, expected, expected_reason) in [
            (Code::FailedPrecondition, "STALE_GENERATION", Code::Aborted, "STALE_GENERATION"),
            (Code::Aborted, "WORKLOAD_EXITED", Code::FailedPrecondition, "EXITED"),
            (Code::DeadlineExceeded, "NOT_READY", Code::Internal, "NOT_READY"),
            (Code::DataLoss, "SANDBOX_LOST", Code::Internal, "SANDBOX_LOST"),
            (Code::FailedPrecondition, "INCOMPATIBLE", Code::FailedPrecondition, "INCOMPATIBLE"),
            (Code::FailedPrecondition, "OCCUPIED", Code::ResourceExhausted, "SLOT_BUSY"),
            (Code::FailedPrecondition, "LEASE_EXPIRED", Code::Unavailable, "NO_LEASE"),
            (Code::Aborted, "TERMINATED", Code::Aborted, "SUPERSEDED"),
            (Code::DataLoss, "", Code::Internal, "START_FAILED"),
            (Code::Unimplemented, "", Code::Unimplemented, "ATEOM"),
        ] {
            let answer = Status::from(start("w1", &status(code, reason, &[])));
            assert_eq!(answer.code(), expected, "{reason}");
            assert_eq!(answer.get_details_error_info().unwrap().reason, expected_reason);
        }
    }

    #[test]
    fn an_exit_names_container_code_and_signal() {
        let theirs = status(Code::Aborted, "WORKLOAD_EXITED", &[("code", "137"), ("container", "main")]);
        let metadata = Status::from(start("w1", &theirs)).get_details_error_info().unwrap().metadata;
        assert_eq!(
            (metadata["code"].as_str(), metadata["signal"].as_str(), metadata["container"].as_str()),
            ("137", "9", "main")
        );
    }

    #[test]
    fn a_refused_checkpoint_means_that_the_actor_runs() {
        for (code, reason, expected, expected_reason) in [
            (Code::FailedPrecondition, "NOT_IDLE", Code::FailedPrecondition, "BUSY"),
            (Code::FailedPrecondition, "NOT_NOW", Code::FailedPrecondition, "NOT_NOW"),
            (Code::FailedPrecondition, "NOT_HERE", Code::NotFound, "NOT_RUNNING"),
            (Code::FailedPrecondition, "STALE_GENERATION", Code::Aborted, "STALE_GENERATION"),
            (Code::Aborted, "WORKLOAD_EXITED", Code::NotFound, "EXITED"),
            (Code::DataLoss, "SANDBOX_LOST", Code::DataLoss, "SANDBOX_LOST"),
        ] {
            let answer = Status::from(checkpoint("w1", &status(code, reason, &[])));
            assert_eq!(answer.code(), expected, "{reason}");
            assert_eq!(answer.get_details_error_info().unwrap().reason, expected_reason);
        }
        assert!(is_transport(&Status::unavailable("x")));
        assert!(!is_transport(&status(Code::Unavailable, "X", &[])));
    }
}
