// SPDX-License-Identifier: Apache-2.0
//! A guest's memory as a file: copies that leave out holes and zeros, and the file system in memory where it is live.
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::{Whence, lseek64};

/// Bytes of a piece that one thread copies at a time.
const PIECE: u64 = 1 << 20;
/// Bytes that are left out when they are zero; a page.
const GRAIN: usize = 4096;
/// Room on the file system in memory beside the guest's own, bytes: console, its inodes.
const BESIDE: u64 = 4 << 20;

/// Mounts a file system in memory for a guest of `bytes`; it goes with its directory.
///
/// # Errors
/// When the system refuses.
pub fn mount_memory(directory: &Path, bytes: u64) -> io::Result<PathBuf> {
    let path = directory.join("memory");
    std::fs::create_dir(&path)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("size={},mode=0711", bytes + BESIDE);
    mount(Some("substrate-memory"), &path, Some("tmpfs"), flags, Some(options.as_str()))?;
    Ok(path)
}

/// A new sparse file.
///
/// # Errors
/// When the system refuses.
pub fn create(path: &Path, bytes: u64) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(bytes)?;
    Ok(file)
}

/// Copies the data of a file of `size` bytes to a new one of the same size on `threads` threads; returns how many
/// bytes were written. Pages of zeros and holes become holes.
///
/// # Errors
/// A read or write that failed; the file's being shorter than `size` is one.
pub fn copy_sparse(from: &File, to: &File, size: u64, threads: usize) -> io::Result<u64> {
    if from.metadata()?.len() < size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (next, written) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || -> io::Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        loop {
            let start = next.fetch_add(PIECE, Ordering::Relaxed);
            if start >= size {
                return Ok(());
            }
            let end = size.min(start + PIECE);
            // SEEK_DATA does not depend on the shared offset, and pread and pwrite do not move it.
            let mut at = match lseek64(from, start as i64, Whence::SeekData) {
                Ok(data) if (data as u64) < end => data as u64,
                Ok(_) | Err(Errno::ENXIO) => continue,
                Err(Errno::EINVAL) => start,
                Err(errno) => return Err(errno.into()),
            };
            let bytes = &mut buffer[..(end - at) as usize];
            from.read_exact_at(bytes, at)?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let zeros = grains(rest, true);
                at += zeros as u64;
                rest = &rest[zeros..];
                let data = grains(rest, false);
                to.write_all_at(&rest[..data], at)?;
                written.fetch_add(data as u64, Ordering::Relaxed);
                at += data as u64;
                rest = &rest[data..];
            }
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for thread in others {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("a copying thread panicked")));
            result = result.and(ended);
        }
        result
    })?;
    Ok(written.into_inner())
}

/// Bytes of the leading grains that are all zero, or are not.
fn grains(bytes: &[u8], zero: bool) -> usize {
    let is_zero = |grain: &[u8]| {
        // Compared with itself one further: memcmp is as fast as memory is.
        grain[0] == 0 && grain[..grain.len() - 1] == grain[1..]
    };
    bytes.chunks(GRAIN).take_while(|grain| is_zero(grain) == zero).map(<[u8]>::len).sum()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn copies_are_complete_and_keep_no_zeros() {
        let size = 5 * PIECE + 4096;
        let from = tempfile::tempfile().unwrap();
        from.set_len(size).unwrap();
        for (at, byte) in [(0, 1), (4095, 2), (PIECE - 1, 3), (3 * PIECE + 8192, 4), (size - 1, 5)] {
            from.write_all_at(&[byte], at).unwrap();
        }
        // Written zeros take room in the source.
        from.write_all_at(&vec![0; 1 << 20], 2 * PIECE).unwrap();
        let to = tempfile::tempfile().unwrap();
        to.set_len(size).unwrap();
        let written = copy_sparse(&from, &to, size, 3).unwrap();
        assert_eq!(written, 4 * 4096, "pages with data, the first of which holds two bytes");
        let read = |file: &File| {
            let mut bytes = vec![0; size as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&from) == read(&to));
        assert!(to.metadata().unwrap().blocks() < from.metadata().unwrap().blocks());
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(PIECE).unwrap();
        assert_eq!(copy_sparse(&from, &to, PIECE + 1, 2).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
