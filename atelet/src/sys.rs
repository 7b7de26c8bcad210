// SPDX-License-Identifier: Apache-2.0
//! What no safe interface offers. The only module of the crate that uses `unsafe`.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes the command's process the leader of a new session, so that neither a terminal's signals nor the end of ours
/// reach it.
pub(crate) fn own_session(command: &mut Command) {
    // SAFETY: between fork and exec only setsid(2) runs, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
}

/// Waits for a descriptor (a pidfd, an inotify queue) to become readable. Needs a runtime.
///
/// # Errors
/// The system's.
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, is always the same descriptor, and is closed only when it is dropped, which the
    // `AsyncFd` does after its deregistration.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}
