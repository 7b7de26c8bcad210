// SPDX-License-Identifier: Apache-2.0
//! How a command ends when it does not succeed: an exit code, a message, the way out.
use std::fmt::Write as _;
use std::process::ExitCode;

use tonic::Code;
use tonic_types::StatusExt as _;

/// Exit codes; documented in `--help` and docs/cli.md, so they never change their meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Anything without a code of its own.
    Failed = 1,
    /// An argument, a document or a field is wrong.
    Usage = 2,
    /// There is no such thing.
    NotFound = 3,
    /// The thing's state forbids it.
    Refused = 4,
    /// Not now: nothing runs, the pool is full, a deadline passed.
    Unavailable = 5,
}

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its exit code.
    pub exit: Exit,
    /// What was attempted, on what, and why it failed.
    pub message: String,
    /// What to do, where that is known.
    pub way_out: Option<String>,
}

impl Failure {
    /// A failure with a code of its own.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), way_out: None }
    }

    /// Code 1.
    pub fn general(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// Code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Names what to do.
    #[must_use]
    pub fn with_way_out(mut self, way_out: impl Into<String>) -> Self {
        self.way_out = Some(way_out.into());
        self
    }

    /// Says what was being done.
    #[must_use]
    pub fn context(mut self, doing: &str) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// Prints it on stderr and yields the process's exit code.
    pub fn report(&self) -> ExitCode {
        // Nobody may be reading any more; the code says it too.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{}\n", self.text()).as_bytes());
        ExitCode::from(self.exit as u8)
    }

    /// What is printed.
    pub fn text(&self) -> String {
        let mut text = format!("substrate: {}", self.message.trim_end());
        if let Some(way_out) = &self.way_out {
            // Servers often end their message with the way out already.
            if !self.message.contains(way_out.as_str()) {
                let _ = write!(text, "\n  → {way_out}");
            }
        }
        text
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let exit = exit_of(status.code());
        let way_out = status.get_details_error_info().and_then(|info| info.metadata.get("way_out").cloned());
        let message = match (status.message(), status.code()) {
            ("", code) => format!("the server answered: {code}"),
            (message, _) => message.to_owned(),
        };
        Self { exit, message, way_out: way_out.filter(|text| !text.is_empty()) }
    }
}

/// The one table from gRPC codes to exit codes.
pub fn exit_of(code: Code) -> Exit {
    match code {
        Code::NotFound => Exit::NotFound,
        Code::FailedPrecondition | Code::Aborted | Code::AlreadyExists => Exit::Refused,
        Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded => Exit::Unavailable,
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        _ => Exit::Failed,
    }
}

/// Attaches what was being done to an I/O error.
pub trait Doing<T> {
    /// Turns the error into a [`Failure`] with code 1 that says what was being done.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::general(format!("{}: {error}", what())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn the_way_out_of_an_error_info_is_printed_once() {
        let metadata = std::collections::HashMap::from([
            ("way_out".to_owned(), "suspend an actor or add workers".to_owned()),
            ("actor".to_owned(), "alice".to_owned()),
        ]);
        let details = ErrorDetails::with_error_info("POOL_FULL", "substrate", metadata);
        let status =
            tonic::Status::with_error_details(Code::ResourceExhausted, "no free worker for alice", details);
        let failure = Failure::from(status);
        assert_eq!(failure.exit, Exit::Unavailable);
        assert_eq!(
            failure.text(),
            "substrate: no free worker for alice\n  → suspend an actor or add workers"
        );
        let said = Failure::general("no worker: suspend one").with_way_out("suspend one");
        assert_eq!(said.text(), "substrate: no worker: suspend one");
    }

    #[test]
    fn every_code_of_the_table_is_what_the_docs_say() {
        let docs = include_str!("../../docs/cli.md");
        for (code, exit) in [
            (Code::NotFound, Exit::NotFound),
            (Code::FailedPrecondition, Exit::Refused),
            (Code::AlreadyExists, Exit::Refused),
            (Code::Unavailable, Exit::Unavailable),
            (Code::ResourceExhausted, Exit::Unavailable),
            (Code::DeadlineExceeded, Exit::Unavailable),
            (Code::InvalidArgument, Exit::Usage),
            (Code::Internal, Exit::Failed),
        ] {
            assert_eq!(exit_of(code), exit, "{code:?}");
        }
        for code in 0..=5 {
            assert!(docs.contains(&format!("\n| {code} |")), "docs/cli.md has no row for exit code {code}");
        }
    }
}
