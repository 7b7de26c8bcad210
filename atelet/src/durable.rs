// SPDX-License-Identifier: Apache-2.0
//! Files that survive a crash: written beside their place, fsynced, renamed, and the directory fsynced.
//!
//! A rename is durable only when the *directory* was fsynced after it (rename(2), fsync(2)); a directory itself only
//! when its parent was.
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Adds what was attempted and on which path to a system error, keeping its kind.
pub fn at(action: &str, path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    let text = format!("cannot {action} {}", path.display());
    move |error| io::Error::new(error.kind(), format!("{text}: {error}"))
}

/// fsyncs a directory.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(at("fsync", path))
}

/// Makes a directory with its parents, each 0700 when it is new, and fsyncs what was changed.
pub fn create_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_dir(parent)?;
    }
    match std::fs::create_dir(path) {
        Ok(()) => {
            std::fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(at("chmod", path))?;
            path.parent().map_or(Ok(()), sync_dir)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(at("create directory", path)(error)),
    }
}

/// Replaces `path` by `content` so that a crash leaves either the old or the new file, and OK means durable.
pub fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temp = path.with_file_name(format!(".{name}.tmp"));
    let result = (|| {
        remove_file(&temp)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temp)
            .map_err(at("create", &temp))?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(at("write", &temp))?;
        crash::point();
        std::fs::rename(&temp, path).map_err(at("rename to", path))?;
        crash::point();
        path.parent().map_or(Ok(()), sync_dir)
    })();
    if result.is_err() {
        remove_file(&temp)?;
    }
    result
}

/// Removes a file; one that is not there is no error.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a tree; one that is not there is no error.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Places at which a test may end the process's work as a kill would: no cleanup runs.
pub(crate) mod crash {
    #[cfg(test)]
    thread_local! {
        static LEFT: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
    }

    /// A place where the process may die. Does nothing outside tests.
    #[inline]
    pub(crate) fn point() {
        #[cfg(test)]
        LEFT.with(|left| match left.get() {
            Some(0) => {
                left.set(None);
                std::panic::resume_unwind(Box::new("crash point"));
            }
            Some(more) => left.set(Some(more - 1)),
            None => {}
        });
    }

    /// Runs `work` once for every crash point it passes, dying there, until it comes through; calls `check` after
    /// each death with the number of points passed.
    #[cfg(test)]
    pub(crate) fn at_every_point<T>(mut work: impl FnMut() -> T, mut check: impl FnMut(u32)) -> T {
        for deaths in 0.. {
            LEFT.with(|left| left.set(Some(deaths)));
            match std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut work)) {
                Ok(value) => {
                    LEFT.with(|left| left.set(None));
                    assert!(deaths > 0, "no crash point was passed");
                    return value;
                }
                Err(payload) if payload.downcast_ref::<&str>() == Some(&"crash point") => check(deaths),
                Err(payload) => std::panic::resume_unwind(payload),
            }
        }
        unreachable!()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_leaves_the_old_or_the_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        write(&path, b"old", 0o600).unwrap();
        crash::at_every_point(
            || write(&path, b"new", 0o600).unwrap(),
            |_| {
                let content = std::fs::read(&path).unwrap();
                assert!(content == b"old" || content == b"new");
            },
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("in the way"), b"").unwrap();
        assert!(write(&path, b"x", 0o600).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
