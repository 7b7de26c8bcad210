// SPDX-License-Identifier: Apache-2.0
//! Running runsc: its flags, its log, and what its failures mean.
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::launcher::{Job, Launcher, Streams};
use crate::runtime::{RuntimeError, file_error};

/// Most of a failed command's output that is kept for its message.
const MAX_TEXT: usize = 2000;

/// runsc with the flags of this crate, for one sandbox.
#[derive(Debug)]
pub struct Runsc {
    binary: PathBuf,
    /// `--root`: this sandbox's own, so that removing the directory removes all trace of it.
    root: PathBuf,
    logs: PathBuf,
    /// Path of an empty network namespace for gofers; otherwise runsc mounts one and leaves it there.
    gofer_namespace: PathBuf,
    launcher: Launcher,
    next: AtomicU64,
}

/// Where a command's own output goes.
pub enum Output {
    /// To a file that is read when it fails.
    Own,
    /// Its streams become those of a workload; what it has to say itself is in its log.
    Workload(Streams),
}

impl Runsc {
    /// For a sandbox whose files live in `directory`.
    ///
    /// # Errors
    /// [`RuntimeError::File`] when its directories cannot be made.
    pub fn new(
        binary: &Path,
        directory: &Path,
        gofer_namespace: &Path,
        launcher: Launcher,
    ) -> Result<Self, RuntimeError> {
        let (root, logs) = (directory.join("runsc"), directory.join("log"));
        for path in [&root, &logs] {
            std::fs::create_dir_all(path).map_err(file_error("create", path))?;
        }
        Ok(Self {
            binary: binary.to_owned(),
            root,
            logs,
            gofer_namespace: gofer_namespace.to_owned(),
            launcher,
            next: AtomicU64::new(1),
        })
    }

    fn command_line(&self, log: &Path, args: &[&str]) -> Vec<String> {
        let mut argv = vec![
            self.binary.display().to_string(),
            format!("--root={}", self.root.display()),
            format!("--log={}", log.display()),
            "--log-format=json".to_owned(),
            "--platform=systrap".to_owned(),
            "--network=sandbox".to_owned(),
            "--overlay2=root:memory".to_owned(),
            "--ignore-cgroups".to_owned(),
            // Where a bundle has a profile; without it runsc would leave it out.
            "--oci-seccomp".to_owned(),
            // Otherwise a restored guest waits for ever on connections whose peers never heard of it.
            "--allow-live-tcp-migration=false".to_owned(),
            format!("--gofer-network-namespace={}", self.gofer_namespace.display()),
        ];
        argv.extend(args.iter().map(|arg| (*arg).to_owned()));
        argv
    }

    /// Returns when no command can be run any more.
    pub async fn gone(&self) {
        self.launcher.gone().await;
    }

    /// Starts a command; its log is at the returned path.
    ///
    /// # Errors
    /// As [`Launcher::spawn`].
    pub async fn spawn(
        &self,
        args: &[&str],
        streams: Streams,
        terminal: bool,
    ) -> Result<(Job, PathBuf), RuntimeError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let log = self.logs.join(format!("{number:03}-{}.log", args.first().unwrap_or(&"runsc")));
        let job = self.launcher.spawn(self.command_line(&log, args), streams, terminal).await?;
        Ok((job, log))
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// [`RuntimeError::Failed`] with what its failure means, [`RuntimeError::Timeout`] after `limit`.
    pub async fn run(&self, args: &[&str], output: Output, limit: Duration) -> Result<(), RuntimeError> {
        self.ask(args, output, limit).await.map(drop)
    }

    /// Runs a command to its end; what it said on streams of its own.
    ///
    /// # Errors
    /// As [`Runsc::run`].
    pub async fn ask(&self, args: &[&str], output: Output, limit: Duration) -> Result<String, RuntimeError> {
        let verb = args.first().copied().unwrap_or_default();
        let (streams, said) = match output {
            Output::Workload(streams) => (streams, None),
            Output::Own => {
                let file = memfd().map_err(file_error("create", Path::new("memfd")))?;
                let copy = file.try_clone().map_err(file_error("duplicate", Path::new("memfd")))?;
                let streams = Streams::output(OwnedFd::from(file))
                    .map_err(file_error("open", Path::new("/dev/null")))?;
                (streams, Some(copy))
            }
        };
        let (mut job, log) = self.spawn(args, streams, false).await?;
        let Ok(exit) = tokio::time::timeout(limit, job.wait()).await else {
            job.signal(Signal::SIGKILL).await;
            return Err(RuntimeError::Timeout { what: format!("runsc {verb}"), seconds: limit.as_secs() });
        };
        let exit = exit?;
        let mut text = read_log(&log);
        if exit.success() {
            if let Err(error) = std::fs::remove_file(&log)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, log = %log.display(), "cannot remove a log of runsc");
            }
            return Ok(said.map(read_tail).unwrap_or_default());
        }
        if let Some(said) = said {
            // What it logs it mostly says too.
            for line in read_tail(said).lines().filter(|line| !line.trim().is_empty()) {
                if !text.contains(line.trim()) {
                    text = format!("{text}\n{line}");
                }
            }
        }
        tracing::warn!(verb, code = exit.code, text = text.trim(), "runsc failed");
        Err(RuntimeError::Failed(explain(verb, exit.code, &text)))
    }
}

fn memfd() -> std::io::Result<std::fs::File> {
    Ok(nix::sys::memfd::memfd_create(c"runsc-output", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?.into())
}

fn read_tail(mut file: std::fs::File) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let length = file.metadata().map_or(0, |meta| meta.len());
    let mut text = Vec::new();
    // Shorter text is better than none.
    let _ = file
        .seek(SeekFrom::Start(length.saturating_sub(MAX_TEXT as u64)))
        .and_then(|_| file.read_to_end(&mut text));
    String::from_utf8_lossy(&text).into_owned()
}

/// What runsc wrote to its `--log`: JSON objects one after another.
pub fn read_log(path: &Path) -> String {
    let Ok(text) = std::fs::read(path) else { return String::new() };
    let mut messages: Vec<String> = Vec::new();
    for value in serde_json::Deserializer::from_slice(&text).into_iter::<serde_json::Value>() {
        match value {
            Ok(value) => messages.extend(value["msg"].as_str().map(str::to_owned)),
            Err(_) => break,
        }
    }
    messages.dedup();
    messages.join("; ")
}

/// Says what a failure of runsc means and what to do, with its own words after. Pure.
pub fn explain(verb: &str, code: i32, text: &str) -> String {
    let has = |needle: &str| text.contains(needle);
    let meaning = if has("flag provided but not defined") || (code == 2 && has("Usage:")) {
        "this runsc does not know a flag that substrate needs: use the pinned version (scripts/setup builds it)"
    } else if verb == "checkpoint" && (has("unknown command") || has("not supported") || has("unimplemented"))
    {
        "this runsc cannot checkpoint: use the pinned version (scripts/setup builds it)"
    } else if has("no space left on device") {
        "the disk is full: free space where snapshots live"
    } else if has("does not match across checkpoint restore") || has("does not contain spec for container") {
        "the snapshot was made under another container spec: reset the actor, or revert to an older snapshot"
    } else if verb == "restore"
        && [
            "EOF",
            "bad magic",
            "hash mismatch",
            "cannot parse",
            "metadata length",
            "error decoding",
            "opening state file",
            "opening restore image",
            "object missing",
            "I/O error",
        ]
        .iter()
        .any(|needle| has(needle))
    {
        "the snapshot's files are missing or damaged: revert to another snapshot"
    } else if verb == "restore" && has("failed to walk") {
        "a file that the snapshot had open is not in the image or its mounts: was the image changed?"
    } else if has("invalidated dentries") {
        "a file that the workload has open was replaced on the host: change files under mounts in place"
    } else if matches!(verb, "start" | "create") && has("no such file or directory") {
        "the command or its interpreter is not in the image"
    } else if matches!(verb, "start" | "create") && has("permission denied") {
        "the command cannot be executed by the container's user"
    } else if has("CPU feature") || has("FeatureSet") {
        "the snapshot needs processor features that this machine has not"
    } else if verb == "create" && has("waiting for sandbox to start") {
        "the sandbox did not come up: can this kernel run systrap (seccomp, user namespaces, memfd)?"
    } else {
        ""
    };
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let words = match words.char_indices().nth(MAX_TEXT / 2) {
        Some((end, _)) => &words[..end],
        None => &words,
    };
    match (meaning, words) {
        ("", "") => format!("runsc {verb} ended with code {code} and said nothing"),
        ("", words) => format!("runsc {verb} failed: {words}"),
        (meaning, words) => format!("{meaning} (runsc {verb}: {words})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_say_what_to_do() {
        for (verb, code, text, meaning) in [
            (
                "create",
                2,
                "flag provided but not defined: -allow-live-tcp-migration\nUsage: …",
                "pinned version",
            ),
            ("checkpoint", 128, "unknown command \"checkpoint\"", "cannot checkpoint"),
            ("restore", 128, "starting container: loading: unexpected EOF", "damaged"),
            (
                "restore",
                128,
                "\"Cwd\" does not match across checkpoint restore for container \"work0\"",
                "another container spec",
            ),
            ("checkpoint", 128, "write: no space left on device", "disk is full"),
            (
                "start",
                128,
                "starting container: exec: \"nope\": no such file or directory",
                "not in the image",
            ),
            ("restore", 128, "failed to walk to \"usr\"", "was the image changed"),
        ] {
            let said = explain(verb, code, text);
            assert!(said.contains(meaning), "{said}");
            assert!(said.contains(text.split_whitespace().next().unwrap()), "runsc's words are lost: {said}");
        }
        assert_eq!(explain("start", 1, " "), "runsc start ended with code 1 and said nothing");
        assert!(explain("create", 1, &"ä".repeat(9000)).len() < 3000);
    }

    #[test]
    fn logs_are_read_without_separators() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"msg":"one","level":"error"}{"msg":"two"} {"msg":"two"}{"ms"#)
            .unwrap();
        assert_eq!(read_log(file.path()), "one; two");
    }
}
