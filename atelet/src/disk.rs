// SPDX-License-Identifier: Apache-2.0
//! Room on the node's disk (P8): new work is refused before the disk is full, because a checkpoint that runs out of
//! space costs the actor its memory.
use std::path::{Path, PathBuf};

/// The disk is too full for what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{path} has {free_mib} MiB free, {need_mib} MiB are needed for {what} (with a reserve of {reserve_mib} MiB): delete actors \
     or snapshots that are no longer needed, or enlarge the disk",
    path = .path.display(), free_mib = .free >> 20, need_mib = (.need + .reserve) >> 20, reserve_mib = .reserve >> 20
)]
pub struct DiskLow {
    /// Where.
    pub path: PathBuf,
    /// For what.
    pub what: String,
    /// Bytes free.
    pub free: u64,
    /// Bytes needed by the work itself.
    pub need: u64,
    /// Bytes kept free.
    pub reserve: u64,
}

/// The disk under a directory.
#[derive(Debug, Clone)]
pub struct Disk {
    path: PathBuf,
    reserve: u64,
}

/// Bytes used and free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes used.
    pub used: u64,
    /// Bytes that may still be written.
    pub free: u64,
}

impl Disk {
    /// Watches the disk of `path`, keeping `reserve` bytes free.
    pub fn new(path: &Path, reserve: u64) -> Self {
        Self { path: path.to_owned(), reserve }
    }

    /// What statvfs(3) says.
    pub fn usage(&self) -> std::io::Result<Usage> {
        let stat = nix::sys::statvfs::statvfs(&self.path).map_err(std::io::Error::from)?;
        let unit = stat.fragment_size();
        Ok(Usage { used: (stat.blocks() - stat.blocks_free()) * unit, free: stat.blocks_available() * unit })
    }

    /// Whether `need` more bytes for `what` leave the reserve untouched.
    ///
    /// # Errors
    /// [`DiskLow`]; a disk that cannot be asked is taken as having room, since writing will tell.
    pub fn admit(&self, what: &str, need: u64) -> Result<(), DiskLow> {
        let Ok(usage) = self.usage() else { return Ok(()) };
        if usage.free >= need.saturating_add(self.reserve) {
            return Ok(());
        }
        Err(DiskLow {
            path: self.path.clone(),
            what: what.to_owned(),
            free: usage.free,
            need,
            reserve: self.reserve,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_beyond_the_reserve_is_refused_with_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Disk::new(dir.path(), 0).admit("x", 1).is_ok());
        let error = Disk::new(dir.path(), u64::MAX / 2).admit("a checkpoint", 1 << 20).unwrap_err();
        assert!(error.to_string().contains("a checkpoint") && error.to_string().contains("delete actors"));
    }
}
