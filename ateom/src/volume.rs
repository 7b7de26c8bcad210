// SPDX-License-Identifier: Apache-2.0
//! Space of volumes, the same for both classes: a file with an ext4 file system in which a volume of N bytes holds N.
//!
//! All of it is reserved on the disk while its actor is awake: a workload could otherwise fill the node's disk within
//! its own quota and would then lose what it had written (a machine whose disk fails stands still). With the space set
//! aside it is told at once that the disk is full, or not at all. While the actor sleeps, the file costs what it holds.
use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

/// Size of a volume whose template does not say, bytes.
pub const DEFAULT_SIZE: u64 = 1 << 30;
/// What the file system needs for itself, beside a sixteenth, bytes.
const OVERHEAD: u64 = 8 << 20;

/// Bytes on the disk that a volume of a size takes while its actor is awake.
pub fn reserved(size: u64) -> u64 {
    (size + size / 16 + OVERHEAD).next_multiple_of(1 << 20)
}

/// Reserves the space of a whole file.
///
/// # Errors
/// The system's; [`io::ErrorKind::StorageFull`] when the space is not there.
pub fn reserve(file: &File) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, file.metadata()?.len() as i64) {
        // Where the file system below cannot, the watermarks have to do.
        Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Gives back what was reserved and never written, or discarded since. Nothing may write to the file meanwhile.
///
/// # Errors
/// The system's.
pub fn give_back(file: &File) -> io::Result<()> {
    let size = file.metadata()?.len() as i64;
    let mut at = 0;
    while at < size {
        // lseek(2): what is reserved only is a hole as well.
        let data = match lseek(file, at, Whence::SeekData) {
            Err(Errno::ENXIO) => size,
            other => other?,
        };
        if data > at {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match fallocate(file, hole, at, data - at) {
                Ok(()) => {}
                // Nothing was reserved either.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        if data == size {
            break;
        }
        at = lseek(file, data, Whence::SeekHole)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::*;

    #[test]
    fn what_is_reserved_and_not_written_is_given_back() {
        let file = tempfile::tempfile().unwrap();
        let size = 8 << 20;
        let written = [(0, 4096), (3 << 20, 64 << 10), (size - 4096, 4096)];
        let on_disk = || file.metadata().unwrap().blocks() * 512;
        file.set_len(size).unwrap();
        reserve(&file).unwrap();
        assert!(on_disk() >= size);
        for (at, length) in written {
            file.write_all_at(&vec![7; length], at).unwrap();
        }
        for _ in 0..2 {
            give_back(&file).unwrap();
            assert!(on_disk() < 1 << 20, "{} bytes", on_disk());
            for (at, length) in written {
                let mut read = vec![0; length];
                file.read_exact_at(&mut read, at).unwrap();
                assert!(read.iter().all(|byte| *byte == 7));
            }
            assert_eq!(file.metadata().unwrap().len(), size);
            reserve(&file).unwrap();
            assert!(on_disk() >= size);
        }
    }
}
