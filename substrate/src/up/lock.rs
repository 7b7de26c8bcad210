// SPDX-License-Identifier: Apache-2.0
//! One `substrate up` per directory: an exclusive flock(2) on DIR/lock, which holds the owner's pid for the message.
//! The lock ends with the process, however that ends.
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::failure::{Doing as _, Exit, Failure};

/// Holds the directory until dropped.
#[derive(Debug)]
pub struct DirLock {
    _file: Flock<File>,
}

/// Takes a directory for this process.
///
/// # Errors
/// Code 4 naming the pid of the process that has it.
pub fn take(dir: &Path) -> Result<DirLock, Failure> {
    let path = dir.join("lock");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .doing(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut file) => {
            let pid = std::process::id().to_string();
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(pid.as_bytes()))
                .doing(|| format!("cannot write {}", path.display()))?;
            Ok(DirLock { _file: file })
        }
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let pid = if pid.is_empty() { "unknown" } else { pid.trim() };
            Err(Failure::new(
                Exit::Refused,
                format!("another substrate runs on {} (pid {pid})", dir.display()),
            )
            .with_way_out(format!("stop it (kill {pid}), or choose another --dir")))
        }
        Err((_, error)) => Err(Failure::general(format!("cannot lock {}: {error}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_refused_by_pid_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path()).unwrap();
        let failure = take(dir.path()).unwrap_err();
        assert_eq!(failure.exit, Exit::Refused);
        assert!(failure.message.contains(&format!("pid {}", std::process::id())), "{}", failure.message);
        drop(first);
        take(dir.path()).unwrap();
    }
}
