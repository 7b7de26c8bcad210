// SPDX-License-Identifier: Apache-2.0
//! One JSON line per call that changes something, and per refused call, written before the answer goes out.
//!
//! A line is one `write(2)` to a file in append mode: it survives the end of the process, not a power loss. The file
//! is renamed to `….1` when it is large. A disk that is full does not stop the control plane: suspending actors is
//! what saves their memory then; the loss is logged.
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::AccessError;

/// From this size on a file is rotated, bytes.
const ROTATE_AT: u64 = 64 << 20;

/// A line.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Line<'a> {
    /// Unix time, ms.
    pub(crate) time_ms: i64,
    /// `uid:0`, `cert:…`, `token:…`; empty when the caller is not known.
    pub(crate) who: &'a str,
    /// Where the call came from: `unix`, or the client's address.
    pub(crate) from: &'a str,
    pub(crate) verb: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) atespace: &'a str,
    /// Name, or uid where only that was given.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) actor: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) request_id: &'a str,
    /// `OK`, a gRPC code such as `PERMISSION_DENIED`, or `CLIENT_LEFT`: it went on without its caller.
    pub(crate) outcome: &'a str,
    /// The refusal's reason, UPPER_SNAKE.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) reason: &'a str,
    /// From arrival to answer, ms.
    pub(crate) ms: u64,
}

/// The log.
pub(crate) struct Audit {
    path: PathBuf,
    rotate_at: u64,
    file: Mutex<(File, u64)>,
}

impl Audit {
    pub(crate) fn open(path: &Path) -> Result<Self, AccessError> {
        Self::open_with(path, ROTATE_AT)
    }

    fn open_with(path: &Path, rotate_at: u64) -> Result<Self, AccessError> {
        let file = append(path)
            .map_err(|error| AccessError::Audit { path: path.to_owned(), reason: error.to_string() })?;
        Ok(Self { path: path.to_owned(), rotate_at, file: Mutex::new(file) })
    }

    pub(crate) fn write(&self, line: &Line<'_>) {
        let mut bytes = match serde_json::to_vec(line) {
            Ok(bytes) => bytes,
            Err(error) => return tracing::error!(%error, ?line, "an audit line was lost"),
        };
        bytes.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if file.1 >= self.rotate_at
            && let Err(error) = self.rotate(&mut file)
        {
            tracing::error!(%error, log = %self.path.display(), "the audit log cannot be rotated; it grows on");
        }
        match file.0.write_all(&bytes) {
            Ok(()) => file.1 += bytes.len() as u64,
            Err(error) => {
                tracing::error!(%error, ?line, log = %self.path.display(), "an audit line was lost");
            }
        }
    }

    fn rotate(&self, file: &mut (File, u64)) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        *file = append(&self.path)?;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<(File, u64)> {
    let file = File::options().append(true).create(true).mode(0o600).open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(verb: &str) -> Line<'_> {
        Line {
            time_ms: 1,
            who: "token:ci",
            from: "unix",
            verb,
            atespace: "team",
            actor: "",
            request_id: "",
            outcome: "OK",
            reason: "",
            ms: 2,
        }
    }

    #[test]
    fn lines_are_appended_and_rotated_by_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        Audit::open_with(&path, 150).unwrap().write(&line("A"));
        let audit = Audit::open_with(&path, 150).unwrap();
        audit.write(&line("B"));
        audit.write(&line("C"));
        let verbs = |path: &Path| -> Vec<String> {
            let text = std::fs::read_to_string(path).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            lines.map(|line| line["verb"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(verbs(&dir.path().join("audit.jsonl.1")), ["A", "B"]);
        assert_eq!(verbs(&path), ["C"]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("\"actor\"") && text.contains("\"who\":\"token:ci\""), "{text}");
    }
}
