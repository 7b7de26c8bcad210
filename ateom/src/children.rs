// SPDX-License-Identifier: Apache-2.0
//! The child processes of this ateom, and what falls to it as a subreaper.
//!
//! runsc leaves its sandbox and gofer processes behind, whose parent is then the nearest subreaper; a zombie among
//! them would hold up `runsc delete` and the end of its cgroup's pid accounting. So everything is reaped here, in one
//! place, and nobody else waits for a child: a status is handed to whoever spawned the process through
//! [`Children::spawn`], any other is dropped. Spawning and reaping exclude each other, so no status is lost to a
//! process that ends before it is registered.
use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exit {
    /// 0..255, or 128 + signal.
    pub code: i32,
    /// 0 when it ended by itself.
    pub signal: i32,
}

impl Exit {
    /// Ended by itself with 0.
    pub fn success(self) -> bool {
        self.code == 0
    }

    /// From a status of wait(2); `None` for stops and continues.
    pub(crate) fn from_status(status: WaitStatus) -> Option<(Pid, Self)> {
        match status {
            WaitStatus::Exited(pid, code) => Some((pid, Self { code, signal: 0 })),
            WaitStatus::Signaled(pid, signal, _) => {
                Some((pid, Self { code: 128 + signal as i32, signal: signal as i32 }))
            }
            _ => None,
        }
    }
}

/// The table of awaited children. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Children {
    awaited: Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>,
}

impl Children {
    /// Begins to reap. Call once in a process, inside a runtime.
    ///
    /// # Errors
    /// When SIGCHLD cannot be watched or this process cannot be made a subreaper.
    pub fn reap() -> io::Result<Self> {
        nix::sys::prctl::set_child_subreaper(true)?;
        let children = Self::default();
        let mut ended = signal(SignalKind::child())?;
        let table = children.clone();
        tokio::spawn(async move {
            while ended.recv().await.is_some() {
                table.collect();
            }
        });
        Ok(children)
    }

    fn collect(&self) {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(status) => {
                    if let Some((pid, exit)) = Exit::from_status(status)
                        && let Some(sender) = awaited.remove(&pid.as_raw())
                    {
                        // Nobody waits for it any more: that is the caller's choice.
                        let _ = sender.send(exit);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot reap children");
                    return;
                }
            }
        }
    }

    /// Starts a process whose end is told by the receiver.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn spawn(&self, command: &mut Command) -> io::Result<(i32, oneshot::Receiver<Exit>)> {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        // The reaper waits for it; dropping the handle only closes its pipes, of which there are none left here.
        let pid = command.spawn()?.id() as i32;
        let (sender, receiver) = oneshot::channel();
        awaited.insert(pid, sender);
        Ok((pid, receiver))
    }
}
