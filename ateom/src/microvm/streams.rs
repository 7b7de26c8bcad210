// SPDX-License-Identifier: Apache-2.0
//! Descriptors of an exec as asynchronous streams. Pipes and terminals are waited for; what cannot be (`/dev/null`,
//! files) never blocks.
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;

use crate::exec::{read_some, write_all};
use crate::sys::watched;

/// A descriptor that is watched, or one that never blocks.
#[derive(Debug)]
enum End {
    Watched(AsyncFd<OwnedFd>),
    Plain(File),
}

fn end(fd: OwnedFd) -> io::Result<End> {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    let copy = fd.try_clone()?;
    match watched(fd) {
        Ok(fd) => Ok(End::Watched(fd)),
        Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok(End::Plain(copy.into())),
        Err(error) => Err(error),
    }
}

/// What a process reads.
#[derive(Debug)]
pub struct Input(End);

impl Input {
    /// Takes a descriptor.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        end(fd).map(Self)
    }

    /// Waits for bytes; 0 is the end.
    ///
    /// # Errors
    /// As read(2).
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            End::Plain(file) => file.read(buffer),
            End::Watched(fd) => read_some(fd, buffer).await,
        }
    }
}

/// What a process writes.
#[derive(Debug)]
pub struct Output(End);

impl Output {
    /// Takes a descriptor.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        end(fd).map(Self)
    }

    /// Writes all, waiting for room.
    ///
    /// # Errors
    /// As write(2).
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            End::Plain(file) => file.write_all(bytes),
            End::Watched(fd) => write_all(fd, bytes).await,
        }
    }
}

/// Makes a terminal pass bytes as they are: the guest has the one that counts. Returns its rows and columns.
///
/// # Errors
/// ENOTTY when it is none.
pub fn make_raw(fd: &OwnedFd) -> io::Result<(u16, u16)> {
    let mut attributes = tcgetattr(fd)?;
    cfmakeraw(&mut attributes);
    tcsetattr(fd, SetArg::TCSANOW, &attributes)?;
    crate::sys::terminal_size(fd.as_fd())
}
