// SPDX-License-Identifier: Apache-2.0
//! The duties of a first process: one child that matters, signals for it, and orphans to reap.
use std::io;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

/// Passed on to the child.
const PASSED_ON: [Signal; 7] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// Runs a command until it ends, with our own standard streams; its exit code, 128 + signal if one ended it.
///
/// # Errors
/// When it cannot be started.
pub async fn run(program: &str, arguments: &[String]) -> io::Result<i32> {
    // Before the child exists, so that its end is not missed.
    let mut children = signal(SignalKind::child())?;
    let mut signals = Vec::new();
    for passed in PASSED_ON {
        signals.push((passed, signal(SignalKind::from_raw(passed as i32))?));
    }
    let child = Command::new(program)
        .args(arguments)
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot start {program}: {error}")))?;
    let pid = Pid::from_raw(child.id() as i32);
    for (passed, mut arrived) in signals {
        tokio::spawn(async move {
            while arrived.recv().await.is_some() {
                if let Err(error) = kill(pid, passed) {
                    tracing::debug!(%error, signal = passed.as_str(), "cannot pass a signal on");
                }
            }
        });
    }
    loop {
        if let Some(code) = reap(pid)? {
            return Ok(code);
        }
        children.recv().await;
    }
}

/// Reaps what has ended; the code of the child, if it has.
fn reap(child: Pid) -> io::Result<Option<i32>> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(Some(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => return Ok(Some(128 + signal as i32)),
            Ok(WaitStatus::StillAlive) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
