// SPDX-License-Identifier: Apache-2.0
//! The digest of a whole file: SHA-256 over the SHA-256 of each of its blocks.
//!
//! One SHA-256 over a file runs on one core; blocks run on all. The digests of the blocks are what an upload compares
//! with its parents', so a file is hashed once, when it is recorded, and what did not change is not read again. A block
//! that lies wholly in a hole is not read: the digest of zeros is known. The same file always has the same digest,
//! however sparse it is.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// A SHA-256.
pub type Sha = [u8; 32];

/// Bytes that one thread reads at a time, and the blocks of files in records of version 1.
pub const PIECE: u64 = 1 << 20;

/// Digests of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digests {
    /// SHA-256 of each block, zeros and holes included.
    pub blocks: Vec<Sha>,
    /// SHA-256 over them.
    pub whole: Sha,
}

/// SHA-256 of bytes. By *ring*, because snapshots pass through it whole: its assembly uses the CPU's instructions best,
/// in a development build too.
pub fn sha256(content: &[u8]) -> Sha {
    let mut sha = Sha::default();
    sha.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, content).as_ref());
    sha
}

/// Whether all bytes are zero.
pub fn is_zero(content: &[u8]) -> bool {
    // Words at a time: the compiler vectorizes this, a byte-wise `all` it does not.
    let (words, tail) = content.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && tail.iter().all(|byte| *byte == 0)
}

/// Where data may be in `start..end`: the part from the first to the last byte that is not in a hole, `None` when all
/// of it is a hole. A filesystem without holes answers that all is data.
pub fn data_extent(file: &File, start: u64, end: u64) -> io::Result<Option<std::ops::Range<u64>>> {
    match lseek64(file, start as i64, Whence::SeekData) {
        Ok(first) if (first as u64) < end => {
            let first = first as u64;
            // Only the beginning is trimmed: finding the last hole would take a call for each extent.
            Ok(Some(first..end))
        }
        Ok(_) | Err(Errno::ENXIO) => Ok(None),
        Err(Errno::EINVAL) => Ok(Some(start..end)),
        Err(errno) => Err(errno.into()),
    }
}

/// Digests of a file of `size` bytes in blocks of `block` bytes (a power of two), computed on up to `threads` threads.
/// The calling one works too.
///
/// # Errors
/// A read that failed; the file's being shorter than `size` is one.
pub fn of_file(file: &File, size: u64, block: u64, threads: usize) -> io::Result<Digests> {
    let stretch = PIECE.max(block);
    let count = size.div_ceil(stretch);
    let zero = sha256(&vec![0; block as usize]);
    let next = AtomicU64::new(0);
    let work = || -> io::Result<Vec<(u64, Vec<Sha>)>> {
        // A block at a time stays in the cache between being read and being hashed.
        let mut buffer = vec![0; block.min(size) as usize];
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(done);
            }
            let start = number * stretch;
            let end = size.min(start + stretch);
            // Each piece has an lseek of its own file offset; the threads share the descriptor, which is fine:
            // SEEK_DATA does not depend on the offset and pread does not move it.
            if end - start == stretch && data_extent(file, start, end)?.is_none() {
                // A hole that reaches beyond the end of the file would hide a truncation.
                if file.metadata()?.len() < end {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                done.push((number, vec![zero; (stretch / block) as usize]));
                continue;
            }
            let mut digests = Vec::with_capacity((stretch / block) as usize);
            for at in (start..end).step_by(block as usize) {
                let content = &mut buffer[..block.min(end - at) as usize];
                file.read_exact_at(content, at)?;
                let is_hole = content.len() as u64 == block && is_zero(content);
                digests.push(if is_hole { zero } else { sha256(content) });
            }
            done.push((number, digests));
        }
    };
    let threads = threads.clamp(1, count.max(1) as usize);
    let found = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = vec![work()];
        all.extend(others.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a hashing thread panicked")))
        }));
        all
    });
    let mut blocks = vec![[0_u8; 32]; size.div_ceil(block) as usize];
    for part in found {
        for (number, digests) in part? {
            let first = (number * (stretch / block)) as usize;
            blocks[first..first + digests.len()].copy_from_slice(&digests);
        }
    }
    Ok(Digests { whole: sha256(blocks.as_flattened()), blocks })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn plain(content: &[u8], block: u64) -> Digests {
        let blocks: Vec<Sha> = content.chunks(block as usize).map(sha256).collect();
        Digests { whole: sha256(blocks.as_flattened()), blocks }
    }

    #[test]
    fn holes_and_zeros_have_the_same_digest() {
        let size = 9 * PIECE + 12_345;
        let mut content = vec![0_u8; size as usize];
        content[(3 * PIECE + 7) as usize] = 9;
        let mut dense = tempfile::tempfile().unwrap();
        dense.write_all(&content).unwrap();
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(size).unwrap();
        sparse.write_all_at(&[9], 3 * PIECE + 7).unwrap();
        for (threads, block) in [(1, PIECE), (4, 64 << 10), (64, 4 * PIECE)] {
            assert_eq!(of_file(&dense, size, block, threads).unwrap(), plain(&content, block));
            assert_eq!(of_file(&sparse, size, block, threads).unwrap(), plain(&content, block));
        }
        assert_eq!(of_file(&dense, 0, PIECE, 2).unwrap().whole, sha256(&[]));
        sparse.write_all_at(&[1], PIECE).unwrap();
        assert_ne!(of_file(&sparse, size, PIECE, 2).unwrap(), plain(&content, PIECE));
    }

    #[test]
    fn a_shorter_file_is_an_error_also_when_it_is_a_hole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PIECE).unwrap();
        assert!(of_file(&file, 2 * PIECE, PIECE, 2).is_err());
        assert!(of_file(&file, PIECE + 1, 64 << 10, 2).is_err());
        assert!(of_file(&file, PIECE, PIECE, 2).is_ok());
    }
}
