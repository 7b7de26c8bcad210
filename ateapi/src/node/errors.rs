// SPDX-License-Identifier: Apache-2.0
//! What a node's status means, by the list at the head of `atelet.proto`.
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::model::Exit;

/// The meaning of a failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The outcome is not known: the same call is sent again.
    Unknown {
        /// UPPER_SNAKE, if the node gave one.
        reason: Option<String>,
        /// For people.
        message: String,
    },
    /// A higher generation is known there.
    Stale(String),
    /// Refused before anything was touched; true when it was busy.
    Refused {
        /// `only_if_idle` was the cause.
        busy: bool,
        /// UPPER_SNAKE, if it gave one.
        reason: Option<String>,
        /// For people.
        message: String,
    },
    /// A snapshot file is missing or corrupt.
    Corrupt {
        /// "node", "durable" or empty.
        source: String,
        /// For people; names the file.
        message: String,
    },
    /// The workload ended before it was ready.
    Exited(Exit),
    /// It will not work as it is.
    ForGood {
        /// UPPER_SNAKE.
        reason: String,
        /// For people.
        message: String,
    },
    /// Worth another try.
    Again {
        /// UPPER_SNAKE.
        reason: String,
        /// For people.
        message: String,
    },
}

/// Reads a status.
pub fn classify(status: &Status, now_ms: i64) -> Fault {
    let details = status.get_error_details();
    let info = details.error_info();
    let reason = info.map(|info| info.reason.clone()).filter(|reason| !reason.is_empty());
    let datum = |key: &str| info.and_then(|info| info.metadata.get(key)).cloned().unwrap_or_default();
    let message = status.message().to_owned();
    if reason.as_deref() == Some("EXITED") {
        let number = |key: &str| datum(key).parse().unwrap_or_default();
        return Fault::Exited(Exit {
            container: datum("container"),
            code: number("code"),
            signal: number("signal"),
            time_ms: now_ms,
        });
    }
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            Fault::Unknown { reason, message }
        }
        Code::Aborted => Fault::Stale(message),
        Code::FailedPrecondition => {
            Fault::Refused { busy: reason.as_deref() == Some("BUSY"), reason, message }
        }
        Code::DataLoss => Fault::Corrupt { source: datum("source"), message },
        Code::NotFound | Code::InvalidArgument | Code::Unimplemented => {
            let fallback = match status.code() {
                Code::NotFound => "NOT_FOUND",
                Code::InvalidArgument => "INVALID",
                _ => "UNSUPPORTED",
            };
            Fault::ForGood { reason: reason.unwrap_or_else(|| fallback.to_owned()), message }
        }
        code => Fault::Again {
            reason: reason.unwrap_or_else(|| {
                if code == Code::ResourceExhausted { "RESOURCE_EXHAUSTED" } else { "NODE_FAILED" }.to_owned()
            }),
            message,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn with(code: Code, reason: &str, metadata: &[(&str, &str)]) -> Status {
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Status::with_error_details(code, "m", ErrorDetails::with_error_info(reason, "substrate", metadata))
    }

    #[test]
    fn codes_mean_what_the_contract_says() {
        assert!(matches!(classify(&Status::unavailable("x"), 0), Fault::Unknown { .. }));
        assert!(matches!(classify(&Status::deadline_exceeded("x"), 0), Fault::Unknown { .. }));
        assert!(matches!(classify(&Status::aborted("x"), 0), Fault::Stale(_)));
        assert!(matches!(classify(&Status::failed_precondition("x"), 0), Fault::Refused { busy: false, .. }));
        let busy = with(Code::FailedPrecondition, "BUSY", &[]);
        assert!(matches!(classify(&busy, 0), Fault::Refused { busy: true, .. }));
        let corrupt = with(Code::DataLoss, "CORRUPT", &[("source", "node"), ("file", "pages.img")]);
        assert_eq!(classify(&corrupt, 0), Fault::Corrupt { source: "node".into(), message: "m".into() });
        let exited = with(Code::Internal, "EXITED", &[("container", "main"), ("code", "3"), ("signal", "0")]);
        assert_eq!(
            classify(&exited, 5),
            Fault::Exited(Exit { container: "main".into(), code: 3, signal: 0, time_ms: 5 })
        );
        assert!(matches!(classify(&Status::not_found("x"), 0), Fault::ForGood { .. }));
        assert!(matches!(classify(&Status::internal("x"), 0), Fault::Again { .. }));
    }
}
