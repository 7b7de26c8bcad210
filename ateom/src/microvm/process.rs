// SPDX-License-Identifier: Apache-2.0
//! The process of a machine monitor: asked what it is, started in its jail, watched to its end, quoted when it is dead.
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;

use super::{MicrovmError, jail};
use crate::cgroup::blocking;
use crate::launcher::{Launcher, Streams};
use crate::runtime::{RuntimeError, file_error};

/// How long a program may take to say what it is.
const ASK_LIMIT: Duration = Duration::from_secs(10);
/// How long a process whose connection failed may take to be seen dead.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Lines of the console that an error shows; of a panic those around its first.
const LAST_LINES: usize = 12;

/// Runs a program for what it says of itself. Call before children are reaped elsewhere.
///
/// # Errors
/// [`MicrovmError`] when it cannot be run, fails, or hangs.
pub fn ask(binary: &Path, args: &[&str]) -> Result<String, MicrovmError> {
    ask_within(ASK_LIMIT, binary, args)
}

fn ask_within(limit: Duration, binary: &Path, args: &[&str]) -> Result<String, MicrovmError> {
    let missing = |source| MicrovmError::Missing { path: binary.to_owned(), source };
    let asked = args.join(" ");
    let unsuitable = |lack: String| MicrovmError::Unsuitable { path: binary.to_owned(), lack };
    let child = Command::new(binary)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    let pid = Pid::from_raw(child.id() as i32);
    let (answer, answered) = mpsc::channel();
    std::thread::spawn(move || answer.send(child.wait_with_output()));
    let Ok(output) = answered.recv_timeout(limit) else {
        // Still a child of ours that nobody has waited for, so the pid is its own.
        if let Err(errno) = kill(pid, Signal::SIGKILL) {
            tracing::warn!(%errno, binary = %binary.display(), "cannot end a program that hangs");
        }
        return Err(unsuitable(format!("hangs: no answer within {limit:?} when it is asked for {asked}")));
    };
    let output = output.map_err(missing)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(unsuitable(format!("ends with {} when it is asked for {asked}: {said}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What is started.
#[derive(Debug)]
pub struct Program<'a> {
    /// For people.
    pub who: &'static str,
    /// Its file.
    pub binary: &'a Path,
    /// See [`jail::command`].
    pub files: &'a [(bool, PathBuf)],
    /// All of its environment.
    pub environment: &'a [(&'a str, String)],
    /// Its arguments.
    pub args: Vec<String>,
}

/// Where it is started.
#[derive(Debug)]
pub struct Place<'a> {
    /// Its working directory, where `vmm.log` is.
    pub directory: &'a Path,
    /// Starts it.
    pub launcher: &'a Launcher,
    /// Its network namespace.
    pub network_namespace: &'a Path,
}

/// A process that is watched.
#[derive(Debug, Clone)]
pub struct Process {
    died: watch::Receiver<Option<String>>,
}

/// Starts a program in its jail; the guest's console is in `console`.
///
/// # Errors
/// [`RuntimeError`].
pub async fn start(
    place: Place<'_>,
    program: Program<'_>,
    link: Option<OwnedFd>,
    console: PathBuf,
) -> Result<Process, RuntimeError> {
    let Program { who, binary, files, environment, args } = program;
    let log = place.directory.join("vmm.log");
    let file = File::create(&log).map_err(file_error("create", &log))?;
    let argv = jail::command(place.network_namespace, place.directory, binary, files, environment, args);
    let mut streams = Streams::output(file.into()).map_err(file_error("open", Path::new("/dev/null")))?;
    if let Some(link) = link {
        streams.stdin = link;
    }
    let mut job = place.launcher.spawn(argv, streams, false).await?;
    let (dead, died) = watch::channel(None);
    let launcher = place.launcher.clone();
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = job.wait() => match ended {
                Ok(exit) if exit.signal != 0 => format!("{who} was killed by signal {}", exit.signal),
                Ok(exit) => format!("{who} ended with code {}", exit.code),
                Err(error) => error.to_string(),
            },
            () = launcher.gone() => "the launcher in the actor's cgroup died".to_owned(),
        };
        let said = blocking(move || last_words(&log, &console)).await;
        // The machine may be gone already.
        dead.send_replace(Some(format!("{ended}{said}")));
    });
    Ok(Process { died })
}

impl Process {
    /// Why it is gone, once it is.
    pub async fn end(&self) -> String {
        match self.died.clone().wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "nobody watches it any more".to_owned(),
        }
    }

    /// What is known of the end of one whose connection failed.
    pub async fn because(&self, error: RuntimeError) -> RuntimeError {
        match tokio::time::timeout(LAST_WORDS, self.end()).await {
            Ok(why) => RuntimeError::Failed(why),
            Err(_) => error,
        }
    }
}

/// What a monitor and the guest's console said last, for an error's end.
pub(super) fn last_words(log: &Path, console: &Path) -> String {
    let tail = |path: &Path| {
        let text =
            std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let panic = lines.iter().position(|line| line.contains("panic"));
        let first = panic.map_or(lines.len().saturating_sub(LAST_LINES), |line| line.saturating_sub(2));
        lines[first..lines.len().min(first + LAST_LINES)].join(" | ")
    };
    let mut said = String::new();
    for (who, text) in [("it said", tail(log)), ("the guest's console ends with", tail(console))] {
        if !text.is_empty() {
            said.extend(["; ", who, ": ", &text]);
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_last_words_of_a_panic_are_those_around_it() {
        use std::fmt::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let (log, console) = (dir.path().join("log"), dir.path().join("console"));
        let mut text = "a\nb\nc\nKernel panic - not syncing\n".to_owned();
        for line in 0..40 {
            writeln!(text, "trace {line}").unwrap();
        }
        std::fs::write(&console, text).unwrap();
        let said = last_words(&log, &console);
        assert!(said.starts_with("; the guest's console ends with: b | c | Kernel panic"), "{said}");
        assert!(!said.contains("trace 39"), "{said}");
    }

    #[test]
    fn a_program_that_hangs_is_ended_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        std::fs::write(&path, "#!/bin/sh\nexec sleep 1000\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = ask_within(Duration::from_millis(300), &path, &["--version"]).unwrap_err().to_string();
        assert!(error.contains("hangs") && error.contains("--version"), "{error}");
    }
}
