// SPDX-License-Identifier: Apache-2.0
//! Why a call of the gateway failed, and the one place where that becomes a gRPC status.
//!
//! What the gateway does with a status decides the mapping. `ValidateSandboxCreate`: any code and message reach the
//! user unchanged. `CreateSandbox`: only `AlreadyExists` and `FailedPrecondition` do, everything else becomes
//! `Internal` (see [`Failure::for_create`]). `GetSandbox`: `NotFound` means gone for good, so nothing else may be
//! reported as it.
use tonic::{Code, Status};

/// One thing wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct Violation {
    /// The field, as a path from the sandbox down.
    pub path: String,
    /// What is wrong with it and what to write instead.
    pub problem: String,
}

impl Violation {
    /// A violation at `path`.
    pub fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { path: path.into(), problem: problem.into() }
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request cannot be carried out as written.
    #[error("{}", list(.0))]
    Invalid(Vec<Violation>),
    /// There is no such sandbox.
    #[error("{0}")]
    Missing(String),
    /// The id or name is taken by something else.
    #[error("{0}")]
    Exists(String),
    /// The state of things does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// The control plane did not answer.
    #[error(
        "the control plane at {endpoint} cannot be reached to {doing}: {cause}; is it running, and is api_endpoint right?"
    )]
    Unreachable {
        /// What was attempted.
        doing: String,
        /// Where.
        endpoint: String,
        /// The transport's reason.
        cause: String,
    },
    /// The control plane refused.
    #[error("cannot {doing}: {}", .status.message())]
    Refused {
        /// What was attempted.
        doing: String,
        /// Its answer.
        status: Box<Status>,
    },
}

fn list(violations: &[Violation]) -> String {
    violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Failure {
    /// The gRPC code of the control plane's answer or of the driver's own refusal.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Missing(_) => Code::NotFound,
            Self::Exists(_) => Code::AlreadyExists,
            Self::Precondition(_) => Code::FailedPrecondition,
            Self::Unreachable { .. } => Code::Unavailable,
            Self::Refused { status, .. } => status.code(),
        }
    }

    /// Whether the call may have had its effect although it failed.
    pub fn is_ambiguous(&self) -> bool {
        matches!(
            self.code(),
            Code::Unavailable
                | Code::DeadlineExceeded
                | Code::Unknown
                | Code::Internal
                | Code::Cancelled
                | Code::Aborted
        )
    }

    /// The status of a failed create: what a user can act on goes out with a code whose message the gateway keeps.
    pub fn for_create(self) -> Status {
        match self.code() {
            Code::InvalidArgument | Code::NotFound | Code::ResourceExhausted | Code::OutOfRange => {
                Status::failed_precondition(self.to_string())
            }
            _ => self.into(),
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        Self::new(failure.code(), failure.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_keeps_the_message_that_a_user_can_act_on() {
        let refused = |code| Failure::Refused {
            doing: "make the template".to_owned(),
            status: Box::new(Status::new(code, "no such image")),
        };
        let status = refused(Code::NotFound).for_create();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(status.message(), "cannot make the template: no such image");
        assert_eq!(refused(Code::AlreadyExists).for_create().code(), Code::AlreadyExists);
        assert_eq!(refused(Code::Internal).for_create().code(), Code::Internal);
    }

    #[test]
    fn all_violations_are_named() {
        let failure =
            Failure::Invalid(vec![Violation::new("spec.a", "is bad"), Violation::new("spec.b", "too")]);
        assert_eq!(Status::from(failure).message(), "spec.a: is bad; spec.b: too");
    }
}
