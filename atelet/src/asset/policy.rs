// SPDX-License-Identifier: Apache-2.0
//! What may be started on which runtime: pure, and read anew when the file has changed, so that a revocation needs no
//! restart.
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::config::SandboxConfig;
use crate::config::WorkerClass;
use crate::error::NodeError;

const DAY_MS: i64 = 86_400_000;

/// A start that is judged.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// What runs it.
    pub class: WorkerClass,
    /// sha256 (hex) of the runtime.
    pub runtime: &'a str,
    /// Whose.
    pub atespace: &'a str,
    /// Its name.
    pub actor: &'a str,
    /// The snapshot that is restored, with the time of its capture (unix ms); none for a boot.
    pub snapshot: Option<(&'a str, i64)>,
}

/// Judges a start.
///
/// # Errors
/// [`NodeError::RuntimeRevoked`], [`NodeError::SnapshotTooOld`].
pub fn judge(config: &SandboxConfig, file: &Path, start: Start<'_>, now_ms: i64) -> Result<(), NodeError> {
    let class = config.class(start.class);
    let name = format!("{}/{}", start.atespace, start.actor);
    let refusal = if class.is_revoked(start.runtime) {
        NodeError::RuntimeRevoked {
            actor: name.clone(),
            snapshot: start.snapshot.map(|(id, _)| id.to_owned()),
            runtime: start.runtime.to_owned(),
            file: file.to_owned(),
        }
    } else if let Some((id, made_ms)) = start.snapshot
        && let Some(max_days) = class.max_age_days
        && now_ms.saturating_sub(made_ms) > i64::from(max_days) * DAY_MS
    {
        NodeError::SnapshotTooOld {
            actor: name.clone(),
            snapshot: id.to_owned(),
            days: ((now_ms - made_ms) / DAY_MS) as u64,
            max_days,
            file: file.to_owned(),
        }
    } else {
        return Ok(());
    };
    // A boot has nothing to lose and can take another runtime.
    match config.pass(start.atespace, start.actor).filter(|_| start.snapshot.is_some()) {
        Some(entry) => {
            tracing::warn!(actor = name, %refusal, reason = entry.reason, "restored all the same, by an override");
            Ok(())
        }
        None => Err(refusal),
    }
}

/// A sandbox config that follows its file.
#[derive(Debug)]
pub struct Policy {
    path: PathBuf,
    state: Mutex<(Option<Stamp>, Arc<SandboxConfig>)>,
}

/// What changes when a file does.
type Stamp = (SystemTime, u64);

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

impl Policy {
    /// Of a config that was just read from `path`.
    pub fn new(path: &Path, config: SandboxConfig) -> Self {
        Self { path: path.to_owned(), state: Mutex::new((stamp(path), Arc::new(config))) }
    }

    /// What the file says now. One that cannot be used changes nothing: a revocation must not get lost by a typo.
    pub fn now(&self) -> Arc<SandboxConfig> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stamp(&self.path);
        if found != state.0 {
            match SandboxConfig::read(&self.path) {
                Ok(config) => {
                    tracing::info!(file = %self.path.display(), "the sandbox config was read again");
                    state.1 = Arc::new(config);
                }
                Err(error) => tracing::error!(%error, "the sandbox config of before stays in force"),
            }
            state.0 = found;
        }
        Arc::clone(&state.1)
    }

    /// Judges a start by what the file says now.
    ///
    /// # Errors
    /// As [`judge`].
    pub fn judge(&self, start: Start<'_>, now_ms: i64) -> Result<(), NodeError> {
        judge(&self.now(), &self.path, start, now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn start(runtime: &'static str, snapshot: Option<(&'static str, i64)>) -> Start<'static> {
        Start { class: WorkerClass::Gvisor, runtime, atespace: "blue", actor: "alice", snapshot }
    }

    #[test]
    fn revoked_runtimes_and_old_snapshots_stop_a_restore_with_the_choice() {
        let text = format!("[gvisor]\nrevoked = [\"{B}\"]\nmax_age_days = 30\n");
        let config = SandboxConfig::parse(&text).unwrap();
        let ask = |start| judge(&config, Path::new("/etc/sandbox.toml"), start, 100 * DAY_MS);
        ask(start(A, None)).unwrap();
        ask(start(A, Some(("s1", 71 * DAY_MS)))).unwrap();
        for (refused, words) in [
            (start(B, None), &["revoked", "/etc/sandbox.toml"][..]),
            (start(B, Some(("s1", 99 * DAY_MS))), &["s1", "revoked", "reset", "[[overrides]]"]),
            (start(A, Some(("s1", 60 * DAY_MS))), &["s1", "40 days", "reset", "[[overrides]]"]),
        ] {
            let said = ask(refused).unwrap_err().to_string();
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
        // Another class has its own rules.
        ask(Start { class: WorkerClass::Microvm, ..start(B, None) }).unwrap();
    }

    #[test]
    fn an_override_is_for_restores_of_those_it_names() {
        let text = format!(
            "[gvisor]\nrevoked = [\"{B}\"]\n[[overrides]]\nactors = [\"blue/alice\", \"red/*\"]\nreason = \"x\"\n"
        );
        let config = SandboxConfig::parse(&text).unwrap();
        let ask = |start| judge(&config, Path::new("/f"), start, 0);
        let restore = start(B, Some(("s1", 0)));
        ask(restore).unwrap();
        ask(Start { atespace: "red", actor: "bob", ..restore }).unwrap();
        assert!(ask(Start { actor: "bob", ..restore }).is_err(), "another actor");
        assert!(ask(start(B, None)).is_err(), "a boot can take another runtime");
    }

    #[test]
    fn a_changed_file_is_in_force_at_once_and_a_broken_one_never() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sandbox.toml");
        std::fs::write(&path, "").unwrap();
        let policy = Policy::new(&path, SandboxConfig::read(&path).unwrap());
        policy.judge(start(B, None), 0).unwrap();
        std::fs::write(&path, format!("[gvisor]\nrevoked = [\"{B}\"]\n")).unwrap();
        policy.judge(start(B, None), 0).unwrap_err();
        std::fs::write(&path, "[gvisor]\nrevokd = []\n").unwrap();
        policy.judge(start(B, None), 0).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        policy.judge(start(B, None), 0).unwrap_err();
    }

    #[test]
    fn what_a_config_may_not_say() {
        let runtime = |more: &str| format!("[[gvisor.runtimes]]\nname = \"x\"\n{more}\n");
        let asset = |url: &str| {
            format!(
                "amd64 = {{ url = \"{url}\", sha256 = \"{A}\" }}, arm64 = {{ url = \"{url}\", sha256 = \"{A}\" }}"
            )
        };
        let good = runtime(&format!("runsc = {{ {} }}", asset("https://h/runsc")));
        SandboxConfig::parse(&good).unwrap();
        for (bad, word) in [
            ("[gvisor]\nrevokd = []".to_owned(), "revokd"),
            ("[gvisor]\nrevoked = [\"abc\"]".to_owned(), "no sha256"),
            (runtime(""), "names none of runsc"),
            (runtime(&format!("vmm = {{ {} }}", asset("https://h/x"))), "no part of the class"),
            (runtime(&format!("runsc = {{ {} }}", asset("http://example.com/x"))), "http"),
            (runtime(&format!("runsc = {{ {} }}", asset("ftp://h/x"))), "ftp"),
            (runtime("runsc = {}"), "which this machine is"),
            (good.clone() + &good, "used twice"),
            (format!("{good}[gvisor]\nrevoked = [\"{A}\"]"), "put another one first"),
            ("[[overrides]]\nactors = [\"alice\"]\nreason = \"\"".to_owned(), "ATESPACE/ACTOR"),
        ] {
            let error = SandboxConfig::parse(&bad).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
